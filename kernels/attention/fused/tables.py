"""What each tile sees of an interval mask: tables that the attention kernels read.

One small program a tile works out once what every head needs. Axes: M query rows of a tile, K key
tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.fused.blocks import row_bounds, visible
from kernels.attention.fused.tensors import MaskTensors


def bounds(mask: MaskTensors, queries: int, documents: bool = False) -> Tensor | None:
    """What each tile of ``queries`` queries sees, [B, query tiles, 8], int32.

    0, 1: low and high; some row sees a key only if low <= key < high, the pinned key apart.
    2, 3: full_low and full_high; every row sees the keys between. 4: whether some row sees the
    pinned key, if there is one. 5, 6 (for Hopper's forward): the earliest and the latest first
    token of a document that a query of the tile belongs to and sees; T and -1 without any. 7 (for
    the portable one): whether a query of the tile sees key 0 without that being its document's
    first token. None where it would tell nothing: a causal mask's bounds are plain, and so, if
    nobody asks for documents, or there is only one, is the rest.
    """
    if mask.is_causal and not (documents and not mask.one_document):
        return None
    if queries not in mask.bounds:
        batch_size, num_tokens = mask.start_BT.shape
        num_tiles = triton.cdiv(num_tokens, queries)
        bounds_BM8 = mask.start_BT.new_empty((batch_size, num_tiles, 8))
        bounds_kernel[(num_tiles, batch_size)](
            mask.start_BT, mask.stop_BT, mask.document_start_BT, bounds_BM8, num_tokens,
            PINNED=mask.pinned > 0, BM=queries, num_warps=1,
        )  # fmt: skip
        mask.bounds[queries] = bounds_BM8
    return mask.bounds[queries]


def plan(mask: MaskTensors, queries: int, keys: int) -> Tensor | None:
    """The tiles of ``queries`` queries that see each tile of ``keys`` keys, [B, key tiles, 4].

    0, 1: low and high; tiles low, ..., high - 1 hold every query that sees one of the keys. 2, 3:
    full_low and full_high, the longest run of tiles whose queries all see all of the keys; both
    are high without one. None for a causal mask, whose plan is plain.
    """
    if mask.is_causal:
        return None
    batch_size, num_tokens = mask.start_BT.shape
    num_query_tiles, num_key_tiles = triton.cdiv(num_tokens, queries), triton.cdiv(num_tokens, keys)
    plan_BK4 = mask.start_BT.new_empty((batch_size, num_key_tiles, 4))
    tiles_a_program = 16
    plan_kernel[(triton.cdiv(num_key_tiles, tiles_a_program), batch_size)](
        bounds(mask, queries), plan_BK4, num_tokens, num_query_tiles, num_key_tiles,
        PINNED=mask.pinned > 0, BN=keys, TILES=tiles_a_program, num_warps=1,
    )  # fmt: skip
    return plan_BK4


@triton.jit
def _tile_bounds(i, num_tokens, start, stop, PINNED: tl.constexpr):
    """Keys that a tile of queries may see: (low, high, full_low, full_high, any_row).

    Some row sees a key only if low <= key < high (or the key is pinned and any_row is 1); every
    row sees all of full_low <= key < full_high. Empty rows take no part in low and high.
    """
    exists = i < num_tokens
    sees = exists & (stop > start)
    low = tl.min(tl.where(sees, start, num_tokens))
    high = tl.max(tl.where(sees, stop, 0))
    full_low = tl.max(tl.where(exists, start, 0))
    full_high = tl.min(tl.where(exists, stop, num_tokens))
    any_row = tl.max(tl.where(exists & (stop > 0), 1, 0)) if PINNED else 0
    return low, high, full_low, full_high, any_row


@triton.jit
def bounds_kernel(
    start_ptr, stop_ptr, document_ptr, bounds_ptr, num_tokens,
    PINNED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B). bounds [B, query tiles, 8]; see ``bounds``."""
    i_M = tl.program_id(0) * BM + tl.arange(0, BM)
    row_offset = tl.program_id(1).to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, False)
    low, high, full_low, full_high, any_row = _tile_bounds(i_M, num_tokens, start_M, stop_M, PINNED)
    document_M = tl.load(document_ptr + row_offset + i_M, mask=i_M < num_tokens, other=-1)
    sees_M = visible(i_M, document_M, start_M, stop_M, False, PINNED) & (document_M >= 0)
    bounds = bounds_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 8
    tl.store(bounds, low)
    tl.store(bounds + 1, high)
    tl.store(bounds + 2, full_low)
    tl.store(bounds + 3, full_high)
    tl.store(bounds + 4, any_row)
    tl.store(bounds + 5, tl.min(tl.where(sees_M, document_M, num_tokens)))
    tl.store(bounds + 6, tl.max(tl.where(sees_M, document_M, -1)))
    first_M = visible(i_M, i_M * 0, start_M, stop_M, False, PINNED) & (document_M != 0)
    tl.store(bounds + 7, tl.max(first_M.to(tl.int32)))


@triton.jit
def plan_kernel(
    bounds_ptr, plan_ptr, num_tokens, num_query_tiles, num_key_tiles,
    PINNED: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles / TILES, B). For each key tile the query tiles that see it.

    plan [B, key tiles, 4]: low, high, full_low, full_high; tiles low, ..., high - 1 hold every
    query that sees one of the keys, and full_low, ..., full_high - 1 is the longest run of tiles
    whose queries all see all of them.
    """
    batch = tl.program_id(1)
    n_K = tl.program_id(0) * TILES + tl.arange(0, TILES)
    first_K = n_K * BN
    end_K = tl.minimum(first_K + BN, num_tokens)
    low_K = tl.full([TILES], 0, tl.int32) + num_query_tiles
    high_K = tl.zeros([TILES], tl.int32)
    run_K = tl.zeros([TILES], tl.int32)
    longest_K = tl.zeros([TILES], tl.int32)
    full_high_K = tl.zeros([TILES], tl.int32)
    for m in range(num_query_tiles):
        bounds = bounds_ptr + (batch * num_query_tiles + m) * 8
        low_key, high_key = tl.load(bounds), tl.load(bounds + 1)
        full_low_key, full_high_key = tl.load(bounds + 2), tl.load(bounds + 3)
        visits_K = (low_key < end_K) & (high_key > first_K)
        if PINNED:
            visits_K = visits_K | ((n_K == 0) & (tl.load(bounds + 4) > 0))
        low_K = tl.where(visits_K, tl.minimum(low_K, m), low_K)
        high_K = tl.where(visits_K, m + 1, high_K)
        full_K = (full_low_key <= first_K) & (full_high_key >= end_K)
        run_K = tl.where(full_K, run_K + 1, 0)
        longer_K = run_K > longest_K
        longest_K = tl.where(longer_K, run_K, longest_K)
        full_high_K = tl.where(longer_K, m + 1, full_high_K)
    low_K = tl.minimum(low_K, high_K)
    # Without a run of full tiles the masked loops meet at high.
    full_high_K = tl.where(longest_K > 0, full_high_K, high_K)
    plan = plan_ptr + (batch * num_key_tiles + n_K) * 4
    inside_K = n_K < num_key_tiles
    tl.store(plan, low_K, mask=inside_K)
    tl.store(plan + 1, high_K, mask=inside_K)
    tl.store(plan + 2, full_high_K - longest_K, mask=inside_K)
    tl.store(plan + 3, full_high_K, mask=inside_K)
