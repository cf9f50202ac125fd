"""The forward kernel: one program attends from one tile of queries and measures as it goes.

Online softmax over key tiles (FlashAttention-2, arXiv 2307.08691): tiles that every row sees whole
skip the mask, tiles that no row sees are not visited. The statistics cost little beside: the
largest score is the running maximum that the softmax keeps anyway; the score of the first token of
a query's document, and of key 0 where that is another one, takes a dot product a query before the
loops, and exp(score - lse) is the mass; entropy adds one sum, sum_j p_j x_j, to the loops.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import (
    HIDDEN,
    LN_2,
    LOG2_E,
    NEVER,
    bounds_of_tile,
    dot_rows,
    key_tiles,
    lane_sums,
    load_keys,
    load_tile,
    query_tile,
    row_bounds,
    slope_of,
    store_tile,
    visible,
)


@triton.jit
def _attend(
    acc0_ME, acc1_ME, sum_M8, top_M, spread_M8,
    q0_MD, q1_MD, k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M, factor, slope,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    ENTROPY: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add key tiles first_tile, ..., last_tile - 1 to the running softmax.

    top_M: largest score so far, before ``factor`` turns it into units of log 2. sum_M8: lane sums
    of p = 2**(x - top); spread_M8: those of p (x - top). A tile below ``low`` stands for tile 0,
    the one with the pinned key.
    """
    for tile in tl.range(first_tile, last_tile):
        j0 = tl.where(tile < low, 0, tile) * BN if PINNED and MASKED else tile * BN
        k0_ND = load_tile(k0, batch, j0, group, BN)
        k1_ND = load_tile(k1, batch, j0, group, BN) if k1 is not None else None
        x_MN = dot_rows(q0_MD, q1_MD, k0_ND, k1_ND, PRECISION)
        j_N = j0 + tl.arange(0, BN)
        if HAS_SLOPES:
            x_MN = x_MN * factor + slope * (j_N[None, :] - i_M[:, None]).to(tl.float32)
        if MASKED:
            seen_MN = visible(
                i_M[:, None], j_N[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
            )
            x_MN = tl.where(seen_MN, x_MN, HIDDEN)
        new_top_M = tl.maximum(top_M, tl.max(x_MN, 1))
        shift_M = new_top_M if HAS_SLOPES else new_top_M * factor
        # Not a difference of products: contracted to a fused multiply-add, that of two equal ones
        # is a rounding error, which NEVER makes huge.
        drop_M = top_M - new_top_M if HAS_SLOPES else (top_M - new_top_M) * factor
        rescale_M = tl.exp2(drop_M)
        x_MN = x_MN - shift_M[:, None] if HAS_SLOPES else x_MN * factor - shift_M[:, None]
        p_MN = tl.exp2(x_MN)
        if ENTROPY:
            spread_M8 += drop_M[:, None] * sum_M8
            spread_M8 = spread_M8 * rescale_M[:, None] + lane_sums(p_MN * x_MN)
        sum_M8 = sum_M8 * rescale_M[:, None] + lane_sums(p_MN)
        top_M = new_top_M

        acc0_ME = acc0_ME * rescale_M[:, None]
        v0_NE = load_tile(v0, batch, j0, group, BN)
        p_MN = p_MN.to(v0_NE.dtype)
        acc0_ME = tl.dot(p_MN, v0_NE, acc0_ME, input_precision=PRECISION)
        if v1 is not None:
            v1_NE = load_tile(v1, batch, j0, group, BN)
            acc1_ME = acc1_ME * rescale_M[:, None]
            acc1_ME = tl.dot(p_MN, v1_NE, acc1_ME, input_precision=PRECISION)
    return acc0_ME, acc1_ME, sum_M8, top_M, spread_M8


@triton.jit
def _scores(
    q0_MD, q1_MD, k0_MD, k1_MD, key_M, i_M, start_M, stop_M, factor, slope,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """x of one key a query, -inf where the query doesn't see it or it is -1."""
    x_M = tl.sum(q0_MD.to(tl.float32) * k0_MD.to(tl.float32), 1)
    if q1_MD is not None:
        x_M += tl.sum(q1_MD.to(tl.float32) * k1_MD.to(tl.float32), 1)
    x_M *= factor
    if HAS_SLOPES:
        x_M += slope * (key_M - i_M).to(tl.float32)
    sees_M = visible(i_M, key_M, start_M, stop_M, CAUSAL, PINNED) & (key_M >= 0)
    return tl.where(sees_M, x_M, float("-inf"))


@triton.jit
def _score_to_mass(ptr, row_M, exists_M, log_sum_M):
    """Replace scores x in memory by exp(x - log_sum), exact to a few |x| 2^-24.

    Their products are summed in another order than the softmax's own, whence the error; no mass
    passes 1 for that.
    """
    x_M = tl.load(ptr + row_M, mask=exists_M, other=0.0)
    mass_M = tl.exp2(x_M - log_sum_M)
    # Not a minimum, which would make 1 of NaN.
    tl.store(ptr + row_M, tl.where(mass_M > 1.0, 1.0, mass_M), mask=exists_M)


@triton.jit
def forward_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1,
    k_ptr, k_stride_b, k_stride_t, k_stride_g,
    start_ptr, stop_ptr, document_ptr, bounds_ptr,
    null_ptr, null_stride_b, null_stride_h, null_stride_t,
    slopes_ptr,
    lse_ptr, first_ptr, document_mass_ptr, null_mass_ptr, entropy_ptr, top_ptr,
    num_tokens, num_heads, heads_per_group, scale,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_NULL: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, ONE_DOCUMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B H). Parts (q0, q1, ...) are descriptors [B, T, heads, width].

    k_ptr and its strides are the keys', whose last axis has no gaps. Writes out, lse [B, H, T] and,
    if MEASURE, first_mass, document_mass (unless ONE_DOCUMENT, which
    makes it first_mass), null_mass and (ENTROPY) entropy, all [B, H, T], and the largest scaled
    score of the tile, top [B, H, query tiles].
    """
    m, batch, head, group, i_M = query_tile(num_heads, heads_per_group, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    bounds = bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM)
    extra, low, full_low, full_high, high = key_tiles(bounds, m, num_tokens, CAUSAL, PINNED, BM, BN)

    factor = scale * LOG2_E
    slope = slope_of(slopes_ptr, head, LOG2_E, HAS_SLOPES)
    exists_M = i_M < num_tokens
    row_M = tl.program_id(1).to(tl.int64) * num_tokens + i_M
    # Key 0, or the first token of the query's document. Its score waits in memory, where its mass
    # will be, and not in registers that the loops need.
    D0: tl.constexpr = q0.block_shape[3]
    key_M = i_M * 0
    k0_MD = None
    k1_MD = None
    first_differs = False
    if MEASURE:
        k_ptr += batch.to(tl.int64) * k_stride_b + group.to(tl.int64) * k_stride_g
        if not ONE_DOCUMENT:
            key_M = tl.load(document_ptr + row_offset + i_M, mask=exists_M, other=-1)
            first_differs = tl.load(bounds + 7) > 0
        # Asked for before the queries, so that both are waited for at once.
        k0_MD = load_keys(k_ptr, key_M, k_stride_t, 0, D0, HEAD_DIM)
        if q1 is not None:
            k1_MD = load_keys(k_ptr, key_M, k_stride_t, D0, q1.block_shape[3], HEAD_DIM)
    q0_MD = load_tile(q0, batch, m * BM, head, BM)
    q1_MD = load_tile(q1, batch, m * BM, head, BM) if q1 is not None else None
    if MEASURE:
        x_M = _scores(
            q0_MD, q1_MD, k0_MD, k1_MD, key_M, i_M, start_M, stop_M, factor, slope,
            CAUSAL, PINNED, HAS_SLOPES,
        )  # fmt: skip
        if ONE_DOCUMENT:
            tl.store(first_ptr + row_M, x_M, mask=exists_M)
        else:
            tl.store(document_mass_ptr + row_M, x_M, mask=exists_M)
            if first_differs:
                k0_MD = load_keys(k_ptr, i_M * 0, k_stride_t, 0, D0, HEAD_DIM)
                if q1 is not None:
                    k1_MD = load_keys(k_ptr, i_M * 0, k_stride_t, D0, q1.block_shape[3], HEAD_DIM)
                x_M = _scores(
                    q0_MD, q1_MD, k0_MD, k1_MD, i_M * 0, i_M, start_M, stop_M, factor, slope,
                    CAUSAL, PINNED, HAS_SLOPES,
                )  # fmt: skip
                tl.store(first_ptr + row_M, x_M, mask=exists_M)
            else:
                x_M = tl.where(key_M == 0, x_M, float("-inf"))
                tl.store(first_ptr + row_M, x_M, mask=exists_M)
    acc0_ME = tl.zeros([BM, E0], tl.float32)
    acc1_ME = tl.zeros([BM, E1], tl.float32)
    sum_M8 = tl.zeros([BM, 8], tl.float32)
    spread_M8 = tl.zeros([BM, 8], tl.float32)
    top_M = tl.full([BM], NEVER, tl.float32)
    # Unless causal tiles that need the mask, then tiles that don't, then more that do.
    edges = (low - extra, full_low, full_high, high)
    for part in tl.static_range(1 if CAUSAL else 0, 3):
        acc0_ME, acc1_ME, sum_M8, top_M, spread_M8 = _attend(
            acc0_ME, acc1_ME, sum_M8, top_M, spread_M8,
            q0_MD, q1_MD, k0, k1, v0, v1,
            batch, group, low, edges[part], edges[part + 1], i_M, start_M, stop_M, factor, slope,
            part != 1, CAUSAL, PINNED, HAS_SLOPES, ENTROPY, BN, PRECISION,
        )  # fmt: skip

    # Everything from here on is once a tile, in units of log 2. A row without a key has no null
    # slot either.
    sum_M = tl.sum(sum_M8, 1)
    seen_M = sum_M > 0.0
    if not HAS_SLOPES:
        top_M = top_M * factor
    top_M = tl.where(seen_M, top_M, 0.0)
    log_sum_M = top_M + tl.log2(tl.where(seen_M, sum_M, 1.0))
    if HAS_NULL:
        null_ptrs = (
            null_ptr + batch.to(tl.int64) * null_stride_b + head.to(tl.int64) * null_stride_h
        )
        null_ptrs += i_M.to(tl.int64) * null_stride_t
        null_M = tl.load(null_ptrs, mask=exists_M, other=0.0).to(tl.float32) * LOG2_E
        high_M = tl.maximum(log_sum_M, null_M)
        log_sum_M = high_M + tl.log2(tl.exp2(log_sum_M - high_M) + tl.exp2(null_M - high_M))
    # P = p weight.
    weight_M = tl.where(seen_M, tl.exp2(top_M - log_sum_M), 0.0)
    store_tile(out0, batch, m * BM, head, acc0_ME * weight_M[:, None])
    if out1 is not None:
        store_tile(out1, batch, m * BM, head, acc1_ME * weight_M[:, None])
    tl.store(lse_ptr + row_M, tl.where(seen_M, log_sum_M * LN_2, float("-inf")), mask=exists_M)

    if MEASURE:
        log_sum_M = tl.where(seen_M, log_sum_M, float("inf"))
        top = tl.max(tl.where(seen_M & exists_M, top_M * LN_2, float("-inf")), 0)
        tl.store(top_ptr + tl.program_id(1) * tl.num_programs(0) + m, top)
        # What one thread wrote before the loops another may read.
        tl.debug_barrier()
        _score_to_mass(first_ptr, row_M, exists_M, log_sum_M)
        if not ONE_DOCUMENT:
            _score_to_mass(document_mass_ptr, row_M, exists_M, log_sum_M)
        if HAS_NULL:
            null_mass_M = tl.exp2(null_M - log_sum_M)
            tl.store(null_mass_ptr + row_M, null_mass_M, mask=exists_M)
        if ENTROPY:
            # sum_j P_j (log_sum - x_j), relative to top: no difference of two large sums.
            sums_M = sum_M * (log_sum_M - top_M) - tl.sum(spread_M8, 1)
            entropy_M = tl.where(seen_M, tl.maximum(sums_M * weight_M, 0.0), 0.0)
            if HAS_NULL:
                entropy_M += tl.where(null_mass_M > 0.0, null_mass_M * (log_sum_M - null_M), 0.0)
            tl.store(entropy_ptr + row_M, entropy_M * LN_2, mask=exists_M)
