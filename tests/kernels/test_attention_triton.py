"""The Triton kernels against the reference, in Triton's interpreter: every mask, tile and head dim.

The interpreter is slow, so rows are short; small tiles make up for it. It can't do bf16, nor what
the hardware adds: ``test_attention_triton_gpu.py`` has those.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import sink_attention
from kernels.errors import UserError
from kernels.masks import IntervalMask
from tests.kernels.interpreted import (
    IN_INTERPRETER,
    SMALL_SHAPES,
    STATELESS,
    TILED_MASKS,
    documents,
    random_masks,
    tiled,
)

pytest.importorskip("triton")

pytestmark = IN_INTERPRETER

FP32 = 1e-5
"""Allowed error of fp32, relative to a tensor's largest value."""


@pytest.fixture
def check(run_case, assert_agrees):
    """``check(case)``: the kernels in fp32 agree with the reference in fp64, on everything."""

    def run(case, tolerance=FP32, **settings):
        settings = {"statistics": "full", "tap": True} | settings
        ours = run_case(case, torch.float32, implementation="triton", **settings)
        exact = run_case(case, torch.float64, implementation="reference", **settings)
        assert_agrees(ours, exact, tolerance)
        statistics = ours[0].statistics
        assert all(x is None or x.dtype == torch.float32 for x in statistics or ())
        assert not any(x is not None and x.requires_grad for x in statistics or ())
        return ours

    return run


def test_agrees_with_the_reference(interval_case, check, run_case):
    if interval_case.E % 4:
        with pytest.raises(
            UserError, match=r"triton can't run head dim 5 \(only multiples of 4 up to 256\); use"
        ):
            run_case(interval_case, torch.float32, implementation="triton")
        return
    with tiled(128, 64):
        check(interval_case)


@pytest.mark.parametrize(
    "shape", [(16, 16), (16, 64), (64, 16), (128, 128)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("mask", TILED_MASKS)
def test_tile_shapes(mask, shape, case_of, check):
    """Tiles that need no mask, the diagonal, the pinned key's extra tile, tiles nobody sees."""
    with tiled(*shape):
        check(case_of(TILED_MASKS[mask], H=1, G=1, null="BHT"))


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_slopes(mask, case_of, check):
    # The scores reach 100, where fp32 has steps of 1e-5.
    check(case_of(TILED_MASKS[mask], H=2, G=1, slopes=True, null="H"), tolerance=1e-4)


@pytest.mark.parametrize(
    ("D", "E"), [(4, 4), (16, 24), (24, 16), (80, 96), (96, 80), (112, 8), (256, 16), (20, 256)]
)
def test_head_dims(D, E, case_of, check):
    check(case_of(documents(9, 12), H=1, G=1, D=D, E=E))


def test_three_heads_a_group(case_of, check):
    check(case_of(documents(9, 12), H=6, G=2, D=16, null="BHT", slopes=True), tolerance=3e-5)


@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.parametrize("tap", [False, True], ids=["no_tap", "tap"])
def test_gradients_through_one_output_alone(through, tap, case_of, check):
    check(case_of(documents(9, 12), H=1, G=1, null="BHT"), through=through, tap=tap)


@pytest.mark.parametrize("statistics", ["off", "basic", "full"])
def test_levels_without_a_tap(statistics, case_of, check):
    case = case_of(documents(9, 12, pinned=1), H=2, G=1, null="H")
    output, _ = check(case, statistics=statistics, tap=False)
    assert (output.statistics is None) == (statistics == "off")


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_mass_adds_up_to_the_non_empty_queries(mask, case_of):
    case = case_of(TILED_MASKS[mask], H=2, G=1, null="H")
    q, k, v, null_logit = (x.detach() for x in case.tensors(torch.float32).values())
    statistics = sink_attention(
        q, k, v, case.mask, null_logit=null_logit, implementation="triton"
    ).statistics
    total_BH = statistics.key_mass_BHS.sum(-1) + statistics.null_mass_BHT.sum(-1)
    queries_B1 = (case.mask.keys_per_query_BT() > 0).sum(1, keepdim=True)
    torch.testing.assert_close(total_BH, queries_B1.expand_as(total_BH).float())


FP16_MASKS = ["causal", "pinned-window", "any_intervals-pinned"]


@pytest.mark.parametrize("mask", FP16_MASKS)
def test_fp16_errs_no_more_than_attention_written_out(
    mask, case_of, run_case, assert_no_worse_than_plain
):
    case = case_of(TILED_MASKS[mask], H=2, G=1, D=32, E=48, null="BHT")
    ours = run_case(case, torch.float16, "out", implementation="triton")
    exact = run_case(case, torch.float64, "out", implementation="reference")
    assert_no_worse_than_plain(case, torch.float16, ours, exact)


@pytest.mark.parametrize("mask", FP16_MASKS)
def test_statistics_of_fp16_are_those_of_fp32(mask, case_of, assert_agrees):
    """Scores and weights stay in fp32 whatever the inputs are; out and gradients don't."""
    case = case_of(TILED_MASKS[mask], H=2, G=1, D=32, null="BHT")
    outputs = []
    for dtype, implementation in ((torch.float16, "triton"), (torch.float64, "reference")):
        *qkv, null_logit = (x.detach() for x in case.tensors(dtype).values())
        settings = {"statistics": "full", "implementation": implementation}
        outputs.append(sink_attention(*qkv, case.mask, null_logit=null_logit, **settings))
    assert outputs[0].out_BTHE.dtype == torch.float16
    assert outputs[0].lse_BHT.dtype == torch.float32
    ours, exact = ((output._replace(out_BTHE=output.lse_BHT), {}) for output in outputs)
    assert_agrees(ours, exact, FP32)


@settings(max_examples=8, **STATELESS)
@given(random_masks(), SMALL_SHAPES, st.sampled_from(["", "H", "BHT"]))
def test_random_masks(case_of, check, mask, shape, null):
    with tiled(*shape):
        check(case_of(mask, H=1, G=1, null=null))


def test_large_scores_neither_overflow_nor_lose_the_null_slot():
    """exp(score) and exp(null) are far outside fp32 here, and their ratio underflows."""
    q, k = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    q[0, :, 0, 0], k[0, :, 0, 0] = torch.tensor([3.0, -40, 12]), torch.tensor([4.0, 9, 20])
    output = sink_attention(
        q,
        k,
        torch.ones(1, 3, 1, 4),
        IntervalMask.causal(1, 3),
        scale=1.0,
        null_logit=torch.tensor([[[400.0, -370.0, -500.0]]]),
        statistics="full",
        implementation="triton",
    )
    statistics = output.statistics
    torch.testing.assert_close(output.lse_BHT, torch.tensor([[[400.0, -160.0, 240.0]]]))
    torch.testing.assert_close(output.out_BTHE[0, :, 0, 0], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(statistics.null_mass_BHT, torch.tensor([[[1.0, 0.0, 0.0]]]))
    torch.testing.assert_close(statistics.entropy_BHT, torch.zeros(1, 1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(statistics.max_logit_BH, torch.tensor([[240.0]]))


def test_tiles_that_nobody_sees_are_not_read():
    """0 NaN is NaN: a visit, even one that adds nothing, would show. Each document is a tile."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 48, 1, 16, generator=generator) for _ in range(4))
    mask = documents(16, 16, 16)
    for poisoned in range(3):
        own = slice(16 * poisoned, 16 * (poisoned + 1))
        leaves = [x.clone() for x in (q, k, v)]
        upstream = dout.clone()
        for x in (*leaves, upstream):
            x[:, own] = torch.nan
        leaves = [x.requires_grad_() for x in leaves]
        with tiled(16, 16):
            output = sink_attention(*leaves, mask, implementation="triton")
            gradients = torch.autograd.grad(output.out_BTHE, leaves, upstream)
        others = [i for i in range(48) if not own.start <= i < own.stop]
        for x in (output.out_BTHE, *gradients, output.statistics.key_mass_BHS.transpose(1, 2)):
            assert x[:, others].isfinite().all()
