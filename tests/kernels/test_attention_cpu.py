"""The CPU implementation against the reference, with every way it lays out its work."""

import math

import pytest
import torch

from kernels.attention import cpu, cpu_tiles, sink_attention
from kernels.masks import IntervalMask

FP64 = {"rtol": 0, "atol": 1e-10}
FP32 = {"rtol": 1e-5, "atol": 1e-5}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["kept", "rebuilt", "one_row_a_tile"])
def layout(request, monkeypatch) -> str:
    """P kept for the backward pass; rebuilt there; rebuilt, one row of the batch at a time."""
    if request.param != "kept":
        monkeypatch.setattr(cpu, "KEEP_BYTES", 0)
    if request.param == "one_row_a_tile":
        monkeypatch.setattr(cpu_tiles, "TILE_ELEMENTS", 1)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"]
)
def test_agrees_with_the_reference(interval_case, layout, dtype, tolerance, run_case):
    settings = {"statistics": "full", "tap": True}
    ours, our_gradients = run_case(interval_case, dtype, implementation="cpu", **settings)
    exact, exact_gradients = run_case(
        interval_case, torch.float64, implementation="reference", **settings
    )
    torch.testing.assert_close(ours.out_BTHE.double(), exact.out_BTHE, **tolerance)
    torch.testing.assert_close(ours.lse_BHT.double(), exact.lse_BHT, **tolerance)
    for name, wanted in exact.statistics._asdict().items():
        value = getattr(ours.statistics, name)
        assert (value is None) == (wanted is None), name
        if wanted is not None:
            assert value.dtype == dtype and not value.requires_grad
            torch.testing.assert_close(value.double(), wanted, **tolerance, msg=name)
    for name, wanted in exact_gradients.items():
        torch.testing.assert_close(our_gradients[name].double(), wanted, **tolerance, msg=name)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_through_one_output_alone(through, case_of, run_case):
    case = case_of(IntervalMask.from_documents(torch.tensor([[1, 1, 2, 2, 2, -1]])), null="BHT")
    _, ours = run_case(case, torch.float64, through, implementation="cpu")
    _, exact = run_case(case, torch.float64, through, implementation="reference")
    for name, wanted in exact.items():
        torch.testing.assert_close(ours[name], wanted, **FP64, msg=name)


def test_mass_adds_up_to_the_non_empty_queries(interval_case, run_case):
    output, _ = run_case(interval_case, torch.float32, implementation="cpu")
    statistics = output.statistics
    total_BH = statistics.key_mass_BHS.sum(-1)
    if statistics.null_mass_BHT is not None:
        total_BH = total_BH + statistics.null_mass_BHT.sum(-1)
    queries_B1 = (interval_case.mask.keys_per_query_BT() > 0).sum(1, keepdim=True)
    torch.testing.assert_close(total_BH, queries_B1.expand_as(total_BH).float(), **FP32)


def test_keys_that_no_query_of_a_block_sees_are_left_out():
    """Guards the bounds of a tile: a window far down the row must not look at the first keys."""
    window = IntervalMask.causal(2, 200).window(10)
    mask = cpu_tiles.TiledMask(window.start_BT, window.stop_BT, 0, False)
    assert [(tile.r.start, tile.c.start, tile.c.stop) for tile in mask.tiles(num_heads=2)] == [
        (0, 0, 64),
        (64, 55, 128),
        (128, 119, 192),
        (192, 183, 200),
    ]
    padded = IntervalMask.from_documents(torch.tensor([[1] * 190 + [-1] * 10])).window(10)
    mask = cpu_tiles.TiledMask(padded.start_BT, padded.stop_BT, 0, False)
    assert [(tile.c.start, tile.c.stop) for tile in mask.tiles(num_heads=2)][2:] == [(119, 190)]
    padding = IntervalMask.from_documents(torch.tensor([[1] * 70 + [-1] * 130]))
    mask = cpu_tiles.TiledMask(padding.start_BT, padding.stop_BT, 0, False)
    assert [(tile.r.start, tile.c.stop) for tile in mask.tiles(num_heads=2)] == [(0, 64), (64, 70)]


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200, 256])
def test_kept_probabilities_fit_their_memory(num_tokens):
    for mask in (
        IntervalMask.causal(3, num_tokens),
        IntervalMask.causal(3, num_tokens).prefix(num_tokens),
    ):
        tiled = cpu_tiles.TiledMask(mask.start_BT, mask.stop_BT, 0, mask.is_causal)
        used = max(tile.kept.stop for tile in tiled.tiles(num_heads=2))
        assert used <= 3 * 2 * cpu_tiles.max_probabilities(num_tokens, mask.is_causal)


def test_large_scores_neither_overflow_nor_lose_the_null_slot(case_of):
    """exp(score) and exp(null) are far outside fp32 here, and their ratio underflows."""
    q = torch.tensor([3.0, -40.0, 12.0]).view(1, 3, 1, 1)
    k = torch.tensor([4.0, 9.0, 20.0]).view(1, 3, 1, 1)
    null = torch.tensor([[[400.0, -370.0, -500.0]]])
    mask = IntervalMask.causal(1, 3)
    for implementation in ("cpu", "reference"):
        output = sink_attention(
            q, k, torch.ones(1, 3, 1, 1), mask, null_logit=null, implementation=implementation
        )
        torch.testing.assert_close(output.lse_BHT, torch.tensor([[[400.0, -160.0, 240.0]]]))
        torch.testing.assert_close(output.out_BTHE.flatten(), torch.tensor([0.0, 1.0, 1.0]))
        torch.testing.assert_close(
            output.statistics.null_mass_BHT.flatten(), torch.tensor([1.0, 0.0, 0.0])
        )
        assert output.statistics.max_logit_BH.item() == 240.0


def test_strided_inputs(case_of):
    """q, k and v as views of one projection, as models make them."""
    qkv = torch.randn(2, 70, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = IntervalMask.causal(2, 70)
    results = []
    for implementation in ("cpu", "reference"):
        output = sink_attention(*qkv.unbind(2), mask, implementation=implementation)
        weight = torch.linspace(-1, 1, output.out_BTHE.numel(), dtype=torch.float64)
        loss = (output.out_BTHE.transpose(1, 2).reshape(-1) * weight).sum()
        results.append(torch.autograd.grad(loss, qkv)[0])
    torch.testing.assert_close(*results, **FP64)


def test_the_operators_pass_pytorchs_own_checks():
    q, k, v = (torch.randn(2, 64, 2, 8, requires_grad=True) for _ in range(3))
    null = torch.randn(2, 2, 64, requires_grad=True)
    for mask, keep in (
        (IntervalMask.causal(2, 64), True),
        (IntervalMask.causal(2, 64).window(9), False),
    ):
        where = (mask.start_BT, mask.stop_BT, mask.document_start_BT)
        static = (mask.pinned, mask.is_causal, 0.3, "full", keep)
        torch.library.opcheck(cpu._forward, (q, k, v, *where, null, *static))
    out, lse, kept, *_ = cpu._forward(q, k, v, *where, null, *static)
    shift = torch.randn_like(lse)
    args = (out.detach(), shift, q, k, v, lse, kept, *where[:2], *static[:3])
    torch.library.opcheck(
        cpu._backward, [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    )


def test_empty_rows_stay_empty_with_kept_and_rebuilt_probabilities(layout, case_of, run_case):
    mask = IntervalMask.from_documents(torch.tensor([[1, 1, -1], [-1, -1, -1]]))
    output, gradients = run_case(
        case_of(mask, null="BHT"), torch.float32, statistics="full", implementation="cpu"
    )
    assert output.out_BTHE[1].eq(0).all()
    assert output.lse_BHT[1].eq(-math.inf).all()
    for name, gradient in gradients.items():
        assert gradient[1].eq(0).all(), name
    assert output.statistics.null_mass_BHT[1].eq(0).all()
    assert output.statistics.entropy_BHT[1].eq(0).all()
