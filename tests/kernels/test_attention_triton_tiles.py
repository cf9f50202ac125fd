"""How the Triton kernels cut a mask into tiles: plans, bounds, the table of tiles, padding.

Axes: B rows of the batch, T query positions, S key positions, H query heads, D head dim.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from kernels.attention import sink_attention
from kernels.attention.fused import tiles
from kernels.attention.fused.tiles import Situation, Tile, Warpgroups, tile_for
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
from kernels.attention.fused import launch, portable
from kernels.attention.fused.op import backward_outputs
from kernels.attention.fused.tensors import BackwardCall, MaskTensors

pytestmark = IN_INTERPRETER


def plan_by_definition(mask: IntervalMask, shape: tuple[int, int]) -> list[list[int]]:
    """low, high, full_low, full_high of each key tile of row 0, from the intervals of its rows."""
    (queries, keys), num_tokens = shape, mask.num_tokens
    intervals = list(zip(mask.start_BT[0].tolist(), mask.stop_BT[0].tolist(), strict=True))
    query_tiles = [intervals[i : i + queries] for i in range(0, num_tokens, queries)]
    plan = []
    for first in range(0, num_tokens, keys):
        end = min(first + keys, num_tokens)
        visits, full = [], []
        for m, tile in enumerate(query_tiles):
            some = [(start, stop) for start, stop in tile if start < stop]
            meets = any(start < end for start, _ in some) and any(stop > first for _, stop in some)
            sees_pinned = mask.pinned and first == 0 and any(stop > 0 for _, stop in tile)
            if meets or sees_pinned:
                visits.append(m)
            if all(start <= first and end <= stop for start, stop in tile):
                full.append(m)
        runs = [
            (m, n)
            for m in full
            for n in range(m + 1, len(query_tiles) + 1)
            if set(range(m, n)) <= set(full)
        ]
        low, high = (min(visits), max(visits) + 1) if visits else (0, 0)
        # Of runs as long as each other, the first.
        full_low, full_high = max(runs, key=lambda r: (r[1] - r[0], -r[0]), default=(high, high))
        plan.append([low, high, full_low, full_high])
    return plan


def mask_tensors(mask: IntervalMask) -> MaskTensors:
    """The mask with a table for its intervals, even where they are causal."""
    return MaskTensors(
        mask.start_BT, mask.stop_BT, mask.document_start_BT, mask.pinned, False, mask.one_document
    )


def plan_of(mask: IntervalMask, shape: tuple[int, int]) -> list[list[int]]:
    return portable.plan(mask_tensors(mask), *shape)[0].tolist()


@settings(max_examples=20, **STATELESS)
@given(random_masks(), SMALL_SHAPES)
def test_the_plan_is_what_the_intervals_say(mask, shape):
    plan = plan_of(mask, shape)
    assert plan == plan_by_definition(mask, shape)
    queries, keys = shape
    visible_TS = mask.dense_BTS()[0]
    for n, (low, high, full_low, full_high) in enumerate(plan):
        assert 0 <= low <= full_low <= full_high <= high
        seen_T = visible_TS[:, n * keys : (n + 1) * keys]
        assert not seen_T[: low * queries].any() and not seen_T[high * queries :].any()
        assert seen_T[full_low * queries : full_high * queries].all()


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_the_plan_of_long_rows(mask):
    """More key tiles than one program plans, and intervals that are not monotone."""
    mask = TILED_MASKS[mask]
    for shape in ((16, 4), (4, 16), (32, 2)):
        assert plan_of(mask, shape) == plan_by_definition(mask, shape)


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_the_bounds_are_those_of_the_intervals(mask):
    mask, queries = TILED_MASKS[mask], 16
    # A causal mask has bounds only where documents are asked for.
    tensors = replace(mask_tensors(mask), is_causal=False)
    bounds = portable.bounds(tensors, queries)[0].tolist()
    intervals = list(zip(mask.start_BT[0].tolist(), mask.stop_BT[0].tolist(), strict=True))
    firsts = mask.document_start_BT[0].tolist()
    sees = mask.dense_BTS()[0].tolist()
    for m, ours in enumerate(bounds):
        own = range(m * queries, min((m + 1) * queries, mask.num_tokens))
        tile = intervals[own.start : own.stop]
        some = [interval for interval in tile if interval[0] < interval[1]]
        seen = [firsts[i] for i in own if firsts[i] >= 0 and sees[i][firsts[i]]]
        assert ours == [
            min((start for start, _ in some), default=mask.num_tokens),
            max((stop for _, stop in some), default=0),
            max(start for start, _ in tile),
            min(stop for _, stop in tile),
            int(mask.pinned and any(stop > 0 for _, stop in tile)),
            min(seen, default=mask.num_tokens),
            max(seen, default=-1),
            int(any(sees[i][0] and firsts[i] != 0 for i in own)),
        ]


def test_whole_tiles_are_skipped():
    """Guards the speed of sparse masks, which agreement with the reference can't show."""
    plan = plan_of(documents(*[16] * 8), (16, 16))
    assert plan == [[n, n + 1, n + 1, n + 1] for n in range(8)]
    plan = plan_of(IntervalMask.causal(1, 128).window(17), (16, 16))
    assert [high - low for low, high, _, _ in plan] == [2] * 7 + [1]
    plan = plan_of(IntervalMask.causal(1, 128).prefix(128), (16, 32))
    assert plan == [[0, 8, 0, 8]] * 4


def test_tiles_come_from_the_table(monkeypatch):
    """The nearest larger head dim and the nearest length of the card, or of one as capable."""

    def entry(queries=0, **changes) -> dict:
        tile = dict(queries=queries, keys=16, warps=4, stages=3)
        kind = dict(kernel="key", card="A card", capability="8.0", mask="causal", level="basic")
        return {**kind, "head_dim": 64, "tokens": 1024, "ms": 1.0, "tile": tile, **changes}

    hopper = Warpgroups(groups=2, rows=64, stages=2)
    table = [
        entry(queries=1),
        entry(queries=2, ms=0.5),
        entry(queries=3, tokens=8192),
        entry(ms=0.1, tile=tiles.tile_as_json(hopper)),
        entry(queries=4, head_dim=96),
        entry(queries=5, mask="interval"),
        entry(queries=6, level="off"),
        entry(queries=7, card="Another card", capability="9.0", head_dim=256),
    ]
    monkeypatch.setattr(tiles, "_table", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    tiles._look_up.cache_clear()

    def tile(for_hopper=False, **changes):
        usual = dict(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=64)
        situation = {**usual, "num_tokens": 1000, "is_causal": True, "level": "basic", **changes}
        return tile_for("key", Situation(**situation), for_hopper)

    assert tile().queries == tile(head_dim=24).queries == tile(num_tokens=1).queries == 2
    assert tile(for_hopper=True) == hopper
    assert tile(num_tokens=16384, for_hopper=True).queries == 3
    assert tile(head_dim=80).queries == 4
    assert tile(is_causal=False).queries == 5
    assert tile(level="off").queries == 6
    assert tile(head_dim=128) == tiles._ANY_CARD["key"]
    assert tile(dtype=torch.float32) == tiles._FP32
    assert tile(device=torch.device("cpu")) == tiles._INTERPRETED
    with pytest.raises(ZeroDivisionError), tiled(16, 16):
        assert tile().queries == 16
        raise ZeroDivisionError
    assert tile().queries == 2

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card of another name")
    assert tile().queries == 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert tile() == tiles._ANY_CARD["key"]
    tiles._look_up.cache_clear()


def test_the_committed_table_serves_every_call():
    """Each card has a tile that any call can take; rows past the end are padded to 64, no more."""
    entries = tiles._table()
    levels = {"forward": {"off", "basic", "full"}, "query": {"off"}, "key": {"off", "basic"}}
    levels["key_mass"] = {"basic"}
    for card, head_dim in {(entry["card"], entry["head_dim"]) for entry in entries}:
        served = {
            (entry["kernel"], entry["mask"], entry["level"])
            for entry in entries
            if (entry["card"], entry["head_dim"]) == (card, head_dim)
            and isinstance(tiles.tile_from_json(entry["tile"]), Tile)
        }
        assert served == {
            (kernel, mask, level)
            for kernel in tiles.KERNELS
            for mask in ("causal", "interval")
            for level in levels[kernel]
        }
    for entry in entries:
        tile = tiles.tile_from_json(entry["tile"])
        if entry["kernel"] == "key" and isinstance(tile, Warpgroups):
            assert launch.PADDING % tile.rows == 0


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "window"])
def test_rows_past_the_end_take_no_part(is_causal):
    """Bulk copies read past the end of a row: what stands there must make every P 0."""
    mask = IntervalMask.causal(1, 70)
    mask = mask if is_causal else mask.window(5)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 70, 1, 16, generator=generator) for _ in range(4))
    output = sink_attention(q, k, v, mask, implementation="triton")
    out, lse = output.out_BTHE, output.lse_BHT
    tensors = MaskTensors(mask.start_BT, mask.stop_BT, mask.start_BT, 0, is_causal, False)
    call = BackwardCall(dout, None, q, k, v, out, lse, tensors, None, 0.25, True)
    log_sum_BHt, shift_BHt = torch.empty(1, 1, 128), torch.empty(1, 1, 128)
    grads = backward_outputs(q, k, v, lse, "basic")
    launch.query_gradients(call, grads, log_sum_BHt, shift_BHt)
    torch.testing.assert_close(log_sum_BHt[..., :70], lse / math.log(2))
    torch.testing.assert_close(shift_BHt[..., :70], (out * dout).sum(-1).mT)
    assert log_sum_BHt[..., 70:].eq(math.inf).all() and shift_BHt[..., 70:].eq(0).all()
