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
    bounds_of_tile,
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
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4,
    q0_MD, q1_MD, k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M, document_M, factor, slope,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    MEASURE: tl.constexpr, ENTROPY: tl.constexpr, LOOK: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add key tiles first_tile, ..., last_tile - 1 to the running softmax.

    top_M: largest score so far, before ``factor`` turns it into units of log 2. sum_M4: lane sums
    of p = 2**(x - top); spread_M4: those of p (x - top). first_M: key 0's score; own_M4: lane
    sums that hold the score of document_M, which tiles look for if MASKED and LOOK. A tile below
    ``low`` stands for tile 0, the one with the pinned key.
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
            if LOOK:
                own_MN = tl.where(j_N[None, :] == document_M[:, None], x_MN, 0.0)
                own_M4 += lane_sums(own_MN)

        # Not one condition: a static one must stand alone.
        if MEASURE:  # noqa: SIM102
            if j0 == 0:
                first_M = tl.sum(tl.where(j_N[None, :] == 0, x_MN, 0.0), 1)
        new_top_M = tl.maximum(top_M, tl.max(x_MN, 1))
        shift_M = new_top_M if HAS_SLOPES else new_top_M * factor
        # Not a difference of products: contracted to a fused multiply-add, that of two equal ones
        # is a rounding error, which NEVER makes huge.
        drop_M = top_M - new_top_M if HAS_SLOPES else (top_M - new_top_M) * factor
        rescale_M = tl.exp2(drop_M)
        x_MN = x_MN - shift_M[:, None] if HAS_SLOPES else x_MN * factor - shift_M[:, None]
        p_MN = tl.exp2(x_MN)
        if ENTROPY:
            spread_M4 += drop_M[:, None] * sum_M4
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
    return acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4


@triton.jit
def _looking_tiles(bounds, full_low, full_high, CAUSAL: tl.constexpr, BN: tl.constexpr):
    """(full_low, full_high) such that every document's first token lies outside.

    Moves the end that leaves more tiles between. Only tiles with a mask look for first tokens: a
    branch in the loop would cost more than the mask. Documents that see only themselves begin in
    such tiles anyway.
    """
    before = tl.load(bounds + 5) // BN
    if CAUSAL:
        full_high = tl.minimum(full_high, before)
    else:
        after = tl.cdiv(tl.load(bounds + 6) + 1, BN)
        raised = tl.minimum(tl.maximum(full_low, after), full_high)
        lowered = tl.maximum(tl.minimum(full_high, before), full_low)
        raises = full_high - raised >= lowered - full_low
        full_low = tl.where(raises, raised, full_low)
        full_high = tl.where(raises, full_high, lowered)
    return full_low, full_high


@triton.jit
def forward_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1,
    start_ptr, stop_ptr, document_ptr, bounds_ptr,
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

    Writes out, lse [B, H, T] and, if MEASURE, first_mass, document_mass (unless ONE_DOCUMENT, which
    makes it first_mass), null_mass and (ENTROPY) entropy, all [B, H, T], and the largest scaled
    score of the tile, top [B, H, query tiles].
    """
    # The last tiles see most keys under a causal mask: heavy work first fills the card evenly.
    m = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    group = head // heads_per_group
    i_M = m * BM + tl.arange(0, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    bounds = None
    if bounds_ptr is not None:
        bounds = bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM)
    extra, low, full_low, full_high, high = key_tiles(bounds, m, num_tokens, CAUSAL, PINNED, BM, BN)

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
    own_M4 = tl.zeros([BM, 4], tl.float32)
    LOOK: tl.constexpr = MEASURE and not ONE_DOCUMENT
    document_M = i_M
    if LOOK:
        document_M = tl.load(document_ptr + row_offset + i_M, mask=i_M < num_tokens, other=-1)
        full_low, full_high = _looking_tiles(bounds, full_low, full_high, CAUSAL, BN)
    if not CAUSAL:
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4 = _attend(
            acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4,
            q0_MD, q1_MD, k0, k1, v0, v1,
            batch, group, low, low - extra, full_low, i_M, start_M, stop_M, document_M,
            factor, slope,
            True, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, LOOK, BN, PRECISION,
        )  # fmt: skip
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4 = _attend(
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4,
        q0_MD, q1_MD, k0, k1, v0, v1,
        batch, group, low, full_low, full_high, i_M, start_M, stop_M, document_M, factor, slope,
        False, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, LOOK, BN, PRECISION,
    )  # fmt: skip
    acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4 = _attend(
        acc0_ME, acc1_ME, sum_M4, top_M, spread_M4, first_M, own_M4,
        q0_MD, q1_MD, k0, k1, v0, v1,
        batch, group, low, full_high, high, i_M, start_M, stop_M, document_M, factor, slope,
        True, CAUSAL, PINNED, HAS_SLOPES, MEASURE, ENTROPY, LOOK, BN, PRECISION,
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
        tl.store(first_ptr + row_M, tl.exp2(first_M - log_sum_M), mask=exists_M)
        # An empty row has mass 0 there, padding included.
        if LOOK:
            sees_M = visible(i_M, document_M, start_M, stop_M, CAUSAL, PINNED) & (document_M >= 0)
            own_M = tl.sum(own_M4, 1) if HAS_SLOPES else tl.sum(own_M4, 1) * factor
            mass_M = tl.where(sees_M, tl.exp2(own_M - log_sum_M), 0.0)
            tl.store(document_mass_ptr + row_M, mass_M, mask=exists_M)
        if HAS_NULL:
            null_mass_M = tl.exp2(null_M - log_sum_M)
            tl.store(null_mass_ptr + row_M, null_mass_M, mask=exists_M)
        if ENTROPY:
            # sum_j P_j (log_sum - x_j), relative to top: no difference of two large sums.
            sums_M = sum_M * (log_sum_M - top_M) - tl.sum(spread_M4, 1)
            entropy_M = tl.where(seen_M, tl.maximum(sums_M * weight_M, 0.0), 0.0)
            if HAS_NULL:
                entropy_M += tl.where(null_mass_M > 0.0, null_mass_M * (log_sum_M - null_M), 0.0)
            tl.store(entropy_ptr + row_M, entropy_M * LN_2, mask=exists_M)
