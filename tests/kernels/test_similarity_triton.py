"""The Triton kernels against the reference, in Triton's interpreter: every kind, mask and head dim.

The interpreter is slow, so rows are short; small tiles make up for it. It can't do bf16, nor what
the hardware adds: ``test_similarity_triton_gpu.py`` has those.
"""

import pytest
import torch

from kernels.attention.fused.tiles import Tile
from kernels.masks import IntervalMask
from kernels.similarity import similarity_attention
from tests.kernels.cases import Case
from tests.kernels.interpreted import IN_INTERPRETER, any_intervals, documents
from tests.kernels.similarity_runs import KINDS, plain, run, tensors

pytest.importorskip("triton")
from kernels.similarity.fused import launch
from kernels.similarity.fused.tiles import tile_for

pytestmark = IN_INTERPRETER

FP32 = 2e-5
"""Allowed error of fp32, relative to a tensor's largest value or to 1."""

PADDED = IntervalMask.from_documents(torch.tensor([[1] * 37 + [-1] * 13]))

CASES = {
    "causal-T61": Case(IntervalMask.causal(1, 61), H=1, G=1),
    "causal-T21-grouped-D96-E24": Case(IntervalMask.causal(1, 21), H=4, G=2, D=96, E=24),
    "documents-of_1": Case(documents(33, 1, 1, 13), H=1, G=1, D=16, E=80),
    "padding-slopes-bias": Case(PADDED, H=1, G=1, slopes=True, bias=0.75),
    "window-hides_key_0": Case(IntervalMask.causal(1, 50).window(9), H=1, G=1),
    "pinned-window-bias": Case(documents(33, 1, 16, pinned=1).window(20), H=2, G=1, bias=0.75),
    "any_intervals-pinned": Case(any_intervals(61, pinned=1, seed=0), H=1, G=1),
}


@pytest.fixture
def tiled(monkeypatch):
    """``tiled(queries, keys)``: all kernels take tiles of this shape."""

    def use(queries: int, keys: int) -> None:
        tile = Tile(queries=queries, keys=keys, warps=4, stages=1)
        monkeypatch.setattr(launch, "tile_for", lambda *_: tile)

    return use


@pytest.fixture
def check(assert_agrees):
    """``check(case, kind)``: the kernels in fp32 agree on everything with the reference in fp64."""

    def compare(case, kind, tolerance=FP32, **settings):
        settings = {"statistics": "full", "tap": True} | settings
        ours = run(case, kind, torch.float32, implementation="triton", **settings)
        exact = run(case, kind, torch.float64, implementation="reference", **settings)
        assert_agrees(ours, exact, tolerance)
        assert ours[0].lse_BHT.dtype == torch.float32 and not ours[0].lse_BHT.requires_grad
        for x in ours[0].statistics or ():
            assert x is None or (x.dtype == torch.float32 and not x.requires_grad)
        return ours

    return compare


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, kind, check, tiled):
    tiled(32, 16)
    # With slopes scores are sums of large numbers, which fp32 rounds.
    check(CASES[case], kind, tolerance=1e-4 if CASES[case].slopes else FP32)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", [("identity", "clamped_sum"), ("softpick", "sum")], ids="-".join)
def test_tile_shapes(kind, shape, check, tiled):
    """Tiles that need no mask, the diagonal, the pinned key's extra tile, tiles nobody sees."""
    tiled(*shape)
    check(CASES["any_intervals-pinned"], kind)
    # Whole tiles to the end of the row.
    check(Case(IntervalMask.causal(1, 64), H=1, G=1), kind)


@pytest.mark.parametrize("statistics", ["off", "basic", "full"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_levels_without_a_tap(kind, statistics, check):
    case = Case(documents(9, 12, pinned=1), H=1, G=1, bias=0.75)
    output, _ = check(case, kind, statistics=statistics, tap=False)
    assert (output.statistics is None) == (statistics == "off")


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_mass_adds_up_to_the_queries_with_weights(kind):
    """A query that sees keys may still have no weights: softpick's, of negative scores alone."""
    for case in (CASES["pinned-window-bias"], CASES["padding-slopes-bias"]):
        leaves = {name: x.detach() for name, x in tensors(case, kind, torch.float32).items()}
        kinds = {"similarity": kind[0], "normalize": kind[1], "implementation": "triton"}
        # Without the bias, which would leave softpick no row of negative scores.
        output = similarity_attention(**leaves, mask=case.mask, **kinds)
        total_BH = output.statistics.key_mass_BHS.sum(-1)
        weighted_BHT = output.row_abs_sum_BHT >= 1e-30
        # A softpick row of nothing but scores near 0 is made of differences of near numbers.
        torch.testing.assert_close(total_BH, weighted_BHT.sum(-1).float(), rtol=1e-5, atol=0)
        seen_BT = case.mask.keys_per_query_BT() > 0
        if kind[0] == "softpick":
            assert weighted_BHT.sum() < seen_BT.sum() * case.H
        elif not case.slopes:
            assert torch.equal(weighted_BHT, seen_BT[:, None].expand_as(weighted_BHT))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_fp16_errs_no_more_than_attention_written_out(kind):
    case = Case(documents(33, 1, 16, pinned=1).window(20), H=1, G=1, D=32, E=48)
    ours = run(case, kind, torch.float16, implementation="triton")
    exact = run(case, kind, torch.float64, implementation="reference")
    written_out = plain(case, kind, torch.float16)
    assert ours[0].out_BTHE.dtype == torch.float16 and ours[0].lse_BHT.dtype == torch.float32
    torch.testing.assert_close(ours[0].lse_BHT.double(), exact[0].lse_BHT, rtol=1e-5, atol=1e-5)
    for name, allowed in written_out.items():
        value, wanted = (
            (r[0].out_BTHE if name == "out" else r[1][name]).detach().double()
            for r in (ours, exact)
        )
        floor = 1e-6 * wanted.norm()
        assert (value - wanted).norm() <= 2 * (allowed.double() - wanted).norm() + floor, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_head_dim_has_a_tile(dtype):
    """Wider heads never take larger tiles: both sides of one must fit in shared memory."""
    for kernel in ("forward", "query", "key", "key_mass"):
        tiles = [tile_for(kernel, torch.device("cuda"), dtype, D) for D in range(8, 257, 8)]
        buffers = [tile.queries * tile.keys * tile.stages for tile in tiles]
        assert buffers == sorted(buffers, reverse=True)
