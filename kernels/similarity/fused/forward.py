"""The forward kernel: one program attends from one tile of queries and measures as it goes.

Key tiles that every row sees whole skip the mask, those that no row sees are not visited, as in
``kernels.attention.fused.forward``. Weights that are no softmax need no running maximum: they are
summed as they are. softpick's are kept relative to m_i, the largest score so far or 0: relu(e^x -
1) e^-m = relu(e^(x-m) - e^-m), rescaled when m grows.

A first key's score takes one dot product a query before the loops and waits in memory, where its
mass will be. Entropy is log A - sum_j a_j log a_j / A with a = abs(f) and A = sum_j a_j.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import (
    LN_2,
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
from kernels.similarity.fused.blocks import (
    EPSILON,
    SMALLEST_SUM,
    hidden_score,
    lane_maxima,
    reciprocal_of_sum,
    similarity_of,
    unit_of,
)


@triton.jit
def _attend(
    acc0_ME, acc1_ME, abs_M8, norm_M8, spread_M8, top,
    q0_MD, q1_MD, k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M, factor, offset, slope,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add key tiles first_tile, ..., last_tile - 1 to the sums.

    Lane sums: abs_M8 of a = abs(f), norm_M8 of f (identity) or of abs(e^x - 1) (softpick),
    spread_M8 of a log2 a; softpick's all times e^-m. top: largest score so far, [M] for softpick,
    whose m is max(top, 0), else lane maxima [M, 8]. A tile below ``low`` stands for tile 0, the one
    with the pinned key.
    """
    for tile in tl.range(first_tile, last_tile):
        j0 = tl.where(tile < low, 0, tile) * BN if PINNED and MASKED else tile * BN
        k0_ND = load_tile(k0, batch, j0, group, BN)
        k1_ND = load_tile(k1, batch, j0, group, BN) if k1 is not None else None
        x_MN = dot_rows(q0_MD, q1_MD, k0_ND, k1_ND, PRECISION) * factor + offset
        j_N = j0 + tl.arange(0, BN)
        if HAS_SLOPES:
            x_MN += slope * (j_N[None, :] - i_M[:, None]).to(tl.float32)
        shown_MN = x_MN
        if MASKED:
            seen_MN = visible(
                i_M[:, None], j_N[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
            )
            shown_MN = tl.where(seen_MN, x_MN, NEVER)
            x_MN = tl.where(seen_MN, x_MN, hidden_score(SIMILARITY))
        if SIMILARITY == "softpick":
            new_top_M = tl.maximum(top, tl.max(shown_MN, 1))
            shift_M = tl.maximum(new_top_M, 0.0)
            drop_M = tl.maximum(top, 0.0) - shift_M
            rescale_M = tl.exp2(drop_M)
            top = new_top_M
            p_MN = tl.exp2(x_MN - shift_M[:, None]) - tl.exp2(-shift_M)[:, None]
            norm_M8 = norm_M8 * rescale_M[:, None] + lane_sums(tl.abs(p_MN))
            p_MN = tl.maximum(p_MN, 0.0)
            size_MN = p_MN
            if ENTROPY:
                spread_M8 = (spread_M8 + drop_M[:, None] * abs_M8) * rescale_M[:, None]
            abs_M8 *= rescale_M[:, None]
            acc0_ME = acc0_ME * rescale_M[:, None]
            if v1 is not None:
                acc1_ME = acc1_ME * rescale_M[:, None]
        else:
            if MEASURE:
                top = tl.maximum(top, lane_maxima(shown_MN))
            p_MN = similarity_of(x_MN, SIMILARITY)
            size_MN = p_MN
            if SIMILARITY == "identity":
                size_MN = tl.abs(p_MN)
                if NORMALIZE != "none":
                    norm_M8 += lane_sums(p_MN)
        abs_M8 += lane_sums(size_MN)
        if ENTROPY:
            # 0 log 0 is 0.
            spread_M8 += lane_sums(size_MN * tl.log2(tl.maximum(size_MN, SMALLEST_SUM)))

        v0_NE = load_tile(v0, batch, j0, group, BN)
        p_MN = p_MN.to(v0_NE.dtype)
        acc0_ME = tl.dot(p_MN, v0_NE, acc0_ME, input_precision=PRECISION)
        if v1 is not None:
            v1_NE = load_tile(v1, batch, j0, group, BN)
            acc1_ME = tl.dot(p_MN, v1_NE, acc1_ME, input_precision=PRECISION)
    return acc0_ME, acc1_ME, abs_M8, norm_M8, spread_M8, top


@triton.jit
def _part_of_score(q_MD, part, k_ptr, key_M, stride, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """q.k of one key a query over the ``part`` that begins at FIRST; key -1 gives any."""
    k_MD = load_keys(k_ptr, key_M, stride, FIRST, part.block_shape[3], HEAD_DIM)
    return tl.sum(q_MD.to(tl.float32) * k_MD.to(tl.float32), 1)


@triton.jit
def _scores(
    q0_MD, q1_MD, part0, part1, k_ptr, k_stride, key_M, i_M, start_M, stop_M, factor, offset, slope,
    SIMILARITY: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """x of one key a query, a hidden key's where the query doesn't see it or it is -1."""
    x_M = _part_of_score(q0_MD, part0, k_ptr, key_M, k_stride, 0, HEAD_DIM)
    if q1_MD is not None:
        x_M += _part_of_score(q1_MD, part1, k_ptr, key_M, k_stride, part0.block_shape[3], HEAD_DIM)
    x_M = x_M * factor + offset
    if HAS_SLOPES:
        x_M += slope * (key_M - i_M).to(tl.float32)
    sees_M = visible(i_M, key_M, start_M, stop_M, CAUSAL, PINNED) & (key_M >= 0)
    return tl.where(sees_M, x_M, hidden_score(SIMILARITY))


@triton.jit
def _score_to_mass(ptr, row_M, exists_M, norm_M, share_M, SIMILARITY: tl.constexpr):
    """Replace scores in memory by masses. norm_M: softpick's L; share_M: 1 / sum_j abs(f)."""
    x_M = tl.load(ptr + row_M, mask=exists_M, other=0.0)
    if SIMILARITY == "softpick":
        size_M = tl.maximum(tl.exp2(x_M - norm_M) - tl.exp2(-norm_M), 0.0)
    else:
        size_M = tl.abs(similarity_of(x_M, SIMILARITY))
    # Products are summed in another order than the loops' own: no mass may pass 1 for that.
    tl.store(ptr + row_M, tl.minimum(size_M * share_M, 1.0), mask=exists_M)


@triton.jit
def forward_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1,
    k_ptr, k_stride_b, k_stride_t, k_stride_g,
    start_ptr, stop_ptr, document_ptr, bounds_ptr, slopes_ptr,
    abs_ptr, norm_ptr, first_ptr, document_mass_ptr, entropy_ptr, top_ptr,
    num_tokens, num_heads, heads_per_group, scale, bias,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, ONE_DOCUMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B H). Parts (q0, q1, ...) are descriptors [B, T, heads, width].

    Writes out, the row sums abs (softpick's over N) and, for softpick and a normalized identity,
    norm, L or the signed sum; if MEASURE, first_mass, document_mass (unless ONE_DOCUMENT, which
    makes it first_mass) and (ENTROPY) entropy, all [B, H, T], and the largest score of the tile,
    top [B, H, query tiles].
    """
    m, batch, head, group, i_M = query_tile(num_heads, heads_per_group, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    bounds = bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM)
    extra, low, full_low, full_high, high = key_tiles(bounds, m, num_tokens, CAUSAL, PINNED, BM, BN)

    factor = scale * unit_of(SIMILARITY)
    offset = bias * unit_of(SIMILARITY)
    slope = slope_of(slopes_ptr, head, unit_of(SIMILARITY), HAS_SLOPES)
    exists_M = i_M < num_tokens
    row_M = tl.program_id(1).to(tl.int64) * num_tokens + i_M
    q0_MD = load_tile(q0, batch, m * BM, head, BM)
    q1_MD = load_tile(q1, batch, m * BM, head, BM) if q1 is not None else None
    if MEASURE:
        k_ptr += batch.to(tl.int64) * k_stride_b + group.to(tl.int64) * k_stride_g
        key_M = i_M * 0
        if not ONE_DOCUMENT:
            key_M = tl.load(document_ptr + row_offset + i_M, mask=exists_M, other=-1)
        x_M = _scores(
            q0_MD, q1_MD, q0, q1, k_ptr, k_stride_t, key_M, i_M, start_M, stop_M,
            factor, offset, slope, SIMILARITY, CAUSAL, PINNED, HAS_SLOPES, HEAD_DIM,
        )  # fmt: skip
        if ONE_DOCUMENT:
            tl.store(first_ptr + row_M, x_M, mask=exists_M)
        else:
            tl.store(document_mass_ptr + row_M, x_M, mask=exists_M)
            # Whether a query sees key 0 as a stranger to its document.
            if tl.load(bounds + 7) > 0:
                x_M = _scores(
                    q0_MD, q1_MD, q0, q1, k_ptr, k_stride_t, i_M * 0,
                    i_M, start_M, stop_M, factor, offset, slope,
                    SIMILARITY, CAUSAL, PINNED, HAS_SLOPES, HEAD_DIM,
                )  # fmt: skip
                tl.store(first_ptr + row_M, x_M, mask=exists_M)
            else:
                x_M = tl.where(key_M == 0, x_M, hidden_score(SIMILARITY))
                tl.store(first_ptr + row_M, x_M, mask=exists_M)

    acc0_ME = tl.zeros([BM, E0], tl.float32)
    acc1_ME = tl.zeros([BM, E1], tl.float32)
    abs_M8 = tl.zeros([BM, 8], tl.float32)
    norm_M8 = tl.zeros([BM, 8], tl.float32)
    spread_M8 = tl.zeros([BM, 8], tl.float32)
    if SIMILARITY == "softpick":
        top = tl.full([BM], NEVER, tl.float32)
    else:
        top = tl.full([BM, 8], NEVER, tl.float32)
    # Unless causal tiles that need the mask, then tiles that don't, then more that do.
    edges = (low - extra, full_low, full_high, high)
    for part in tl.static_range(1 if CAUSAL else 0, 3):
        acc0_ME, acc1_ME, abs_M8, norm_M8, spread_M8, top = _attend(
            acc0_ME, acc1_ME, abs_M8, norm_M8, spread_M8, top,
            q0_MD, q1_MD, k0, k1, v0, v1,
            batch, group, low, edges[part], edges[part + 1], i_M, start_M, stop_M,
            factor, offset, slope, SIMILARITY, NORMALIZE,
            part != 1, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, BN, PRECISION,
        )  # fmt: skip

    # Everything from here on is once a tile.
    abs_M = tl.sum(abs_M8, 1)
    norm_M = tl.sum(norm_M8, 1)
    # What entropy divides: relative to m where softpick's weights are.
    relative_abs_M = abs_M
    weight_M = tl.full([BM], 1.0, tl.float32)
    if SIMILARITY == "softpick":
        top_M = top
        shift_M = tl.maximum(top_M, 0.0)
        total_M = norm_M + EPSILON * tl.exp2(-shift_M)
        weight_M = 1.0 / total_M
        norm_M = shift_M + tl.log2(total_M)
        abs_M *= weight_M
        tl.store(norm_ptr + row_M, norm_M, mask=exists_M)
    else:
        top_M = tl.max(top, 1)
        if SIMILARITY != "identity":
            norm_M = abs_M
        if NORMALIZE == "clamped_sum":
            weight_M = 1.0 / tl.maximum(tl.abs(norm_M), 1.0)
        elif NORMALIZE == "sum":
            weight_M = reciprocal_of_sum(norm_M)
        if SIMILARITY == "identity" and NORMALIZE != "none":
            tl.store(norm_ptr + row_M, norm_M, mask=exists_M)
    store_tile(out0, batch, m * BM, head, acc0_ME * weight_M[:, None])
    if out1 is not None:
        store_tile(out1, batch, m * BM, head, acc1_ME * weight_M[:, None])
    tl.store(abs_ptr + row_M, abs_M, mask=exists_M)

    if MEASURE:
        share_M = reciprocal_of_sum(abs_M)
        unit = LN_2 if SIMILARITY != "identity" else 1.0
        top_M = tl.where((top_M > NEVER) & exists_M, top_M * unit, float("-inf"))
        tl.store(top_ptr + tl.program_id(1) * tl.num_programs(0) + m, tl.max(top_M, 0))
        # What one thread wrote before the loops another may read.
        tl.debug_barrier()
        _score_to_mass(first_ptr, row_M, exists_M, norm_M, share_M, SIMILARITY)
        if not ONE_DOCUMENT:
            _score_to_mass(document_mass_ptr, row_M, exists_M, norm_M, share_M, SIMILARITY)
        if ENTROPY:
            divides_M = share_M > 0.0
            relative_abs_M = tl.where(divides_M, relative_abs_M, 1.0)
            entropy_M = tl.log2(relative_abs_M) - tl.sum(spread_M8, 1) / relative_abs_M
            entropy_M = tl.where(divides_M, tl.maximum(entropy_M, 0.0), 0.0)
            tl.store(entropy_ptr + row_M, entropy_M * LN_2, mask=exists_M)
