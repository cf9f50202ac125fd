"""The forward kernel: one program attends from one tile of queries and measures as it goes.

Online softmax over key tiles (FlashAttention-2, arXiv 2307.08691): tiles that every row sees whole
skip the mask, tiles that no row sees are not visited. The statistics cost little beside: the
largest score is the running maximum that the softmax keeps anyway; the score of key 0, and of the
first token of a query's document, is one of those of one tile, and exp(score - lse) the mass;
entropy adds one sum, sum_j p_j x_j, to the loop.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import (
    HIDDEN,
    LN_2,
    LOG2_E,
    NEVER,
    dot_rows,
    key_tiles,
    lane_sums,
    load_tile,
    row_bounds,
    store_tile,
    visible,
)


@triton.jit
def _attend(
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M,
    q0_MD, q1_MD, k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M,
    document_M, earliest, latest, factor, slope,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, ONE_DOCUMENT: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add key tiles first_tile, ..., last_tile - 1 to the running softmax.

    top_M: largest score so far, before ``factor`` turns it into units of log 2. sum_M4: lane sums
    of p = 2**(x - top); spread_M4: those of p (x - top). first_M: key 0's score; own_M: that of
    document_M, the first token of the query's document, which lies between earliest and latest. A
    tile below ``low`` stands for tile 0, the one with the pinned key.
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

        # Not one condition: a static one must stand alone.
        if MEASURE:
            if j0 == 0:
                first_M = tl.sum(tl.where(j_N[None, :] == 0, x_MN, 0.0), 1)
            if not ONE_DOCUMENT:  # noqa: SIM102
                if (j0 + BN > earliest) & (j0 <= latest):
                    x_M = tl.sum(tl.where(j_N[None, :] == document_M[:, None], x_MN, 0.0), 1)
                    here_M = (document_M >= j0) & (document_M < j0 + BN)
                    own_M = tl.where(here_M, x_M, own_M)
        new_top_M = tl.maximum(top_M, tl.max(x_MN, 1))
        shift_M = new_top_M if HAS_SLOPES else new_top_M * factor
        old_M = top_M if HAS_SLOPES else top_M * factor
        rescale_M = tl.exp2(old_M - shift_M)
        x_MN = x_MN - shift_M[:, None] if HAS_SLOPES else x_MN * factor - shift_M[:, None]
        p_MN = tl.exp2(x_MN)
        if ENTROPY:
            spread_M4 += (old_M - shift_M)[:, None] * sum_M4
            spread_M4 = spread_M4 * rescale_M[:, None] + lane_sums(p_MN * x_MN)
        sum_M4 = sum_M4 * rescale_M[:, None] + lane_sums(p_MN)
        top_M = new_top_M

        acc0_ME = acc0_ME * rescale_M[:, None]
        v0_NE = load_tile(v0, batch, j0, group, BN)
        p_MN = p_MN.to(v0_NE.dtype)
        acc0_ME = tl.dot(p_MN, v0_NE, acc0_ME, input_precision=PRECISION)
        if v1 is not None:
            v1_NE = load_tile(v1, batch, j0, group, BN)
            acc1_ME = acc1_ME * rescale_M[:, None]
            acc1_ME = tl.dot(p_MN, v1_NE, acc1_ME, input_precision=PRECISION)
    return acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M


@triton.jit
def forward_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1,
    start_ptr, stop_ptr, document_ptr,
    null_ptr, null_stride_b, null_stride_h, null_stride_t,
    slopes_ptr,
    lse_ptr, first_ptr, document_mass_ptr, null_mass_ptr, entropy_ptr, top_ptr,
    num_tokens, num_heads, heads_per_group, scale,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_NULL: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, ONE_DOCUMENT: tl.constexpr,
    E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B H). Parts (q0, q1, ...) are descriptors [B, T, heads, width].

    Writes out, lse [B, H, T] and, if MEASURE, first_mass, document_mass, null_mass, (ENTROPY)
    entropy and the largest scaled score of each row, top, all [B, H, T].
    """
    # The last tiles see most keys under a causal mask: heavy work first fills the card evenly.
    m = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    group = head // heads_per_group
    i_M = m * BM + tl.arange(0, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    extra, low, full_low, full_high, high = key_tiles(
        m, i_M, num_tokens, start_M, stop_M, CAUSAL, PINNED, BM, BN
    )

    q0_MD = load_tile(q0, batch, m * BM, head, BM)
    q1_MD = load_tile(q1, batch, m * BM, head, BM) if q1 is not None else None
    factor = scale * LOG2_E
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2_E
    acc0_ME = tl.zeros([BM, E0], tl.float32)
    acc1_ME = tl.zeros([BM, E1], tl.float32)
    sum_M4 = tl.zeros([BM, 4], tl.float32)
    spread_M4 = tl.zeros([BM, 4], tl.float32)
    top_M = tl.full([BM], NEVER, tl.float32)
    first_M = tl.full([BM], float("-inf"), tl.float32)
    own_M = tl.full([BM], float("-inf"), tl.float32)
    document_M, earliest, latest = i_M, 0, 0
    if MEASURE:  # noqa: SIM102
        if not ONE_DOCUMENT:
            document_M = tl.load(document_ptr + row_offset + i_M, mask=i_M < num_tokens, other=-1)
            earliest = tl.min(tl.where(document_M < 0, num_tokens, document_M))
            latest = tl.max(document_M)
    if not CAUSAL:
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M = _attend(
            acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M,
            q0_MD, q1_MD, k0, k1, v0, v1,
            batch, group, low, low - extra, full_low, i_M, start_M, stop_M,
            document_M, earliest, latest, factor, slope,
            True, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, ONE_DOCUMENT, BN, PRECISION,
        )  # fmt: skip
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M = _attend(
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M, q0_MD, q1_MD, k0, k1, v0, v1,
        batch, group, low, full_low, full_high, i_M, start_M, stop_M,
            document_M, earliest, latest, factor, slope,
        False, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, ONE_DOCUMENT, BN, PRECISION,
    )  # fmt: skip
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M = _attend(
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M, q0_MD, q1_MD, k0, k1, v0, v1,
        batch, group, low, full_high, high, i_M, start_M, stop_M,
            document_M, earliest, latest, factor, slope,
        True, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, ONE_DOCUMENT, BN, PRECISION,
    )  # fmt: skip

    # Everything from here on is once a tile, in units of log 2. A row without a key has no null
    # slot either.
    sum_M = tl.sum(sum_M4, 1)
    seen_M = sum_M > 0.0
    if not HAS_SLOPES:
        top_M = top_M * factor
        first_M = first_M * factor
    top_M = tl.where(seen_M, top_M, 0.0)
    log_sum_M = top_M + tl.log2(tl.where(seen_M, sum_M, 1.0))
    exists_M = i_M < num_tokens
    row_M = tl.program_id(1).to(tl.int64) * num_tokens + i_M
    if HAS_NULL:
        null_ptrs = null_ptr + batch.to(tl.int64) * null_stride_b + head * null_stride_h
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
        tl.store(top_ptr + row_M, tl.where(seen_M, top_M * LN_2, float("-inf")), mask=exists_M)
        mass_M = tl.exp2(first_M - log_sum_M)
        tl.store(first_ptr + row_M, mass_M, mask=exists_M)

        # An empty row has mass 0 there, padding included.
        if not ONE_DOCUMENT:
            mass_M = tl.exp2((own_M if HAS_SLOPES else own_M * factor) - log_sum_M)
        tl.store(document_mass_ptr + row_M, mass_M, mask=exists_M)
        if HAS_NULL:
            null_mass_M = tl.exp2(null_M - log_sum_M)
            tl.store(null_mass_ptr + row_M, null_mass_M, mask=exists_M)
        if ENTROPY:
            # Entropy = log sum - E[x], the null slot's x included; sums are relative to top.
            mean_M = (tl.sum(spread_M4, 1) + sum_M * top_M) * weight_M
            if HAS_NULL:
                mean_M += tl.where(null_mass_M > 0.0, null_mass_M * null_M, 0.0)
            entropy_M = tl.where(seen_M, (log_sum_M - mean_M) * LN_2, 0.0)
            tl.store(entropy_ptr + row_M, entropy_M, mask=exists_M)
