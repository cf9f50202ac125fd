"""The backward kernels: gradients of the queries, then of the keys and values with the key mass.

With weights rebuilt from scores, and scale folded into the last step,

    dx_ij = f'(x_ij) dP_ij / N_i - g'(x_ij) c_i        dP = dO V^T
    dQ = scale dx K      dK = scale dx^T Q      dV = (f / N)^T dO      key_mass_k = sum_i P_ik

where g is what N sums and c_i = dO_i.out_i N'_i / N_i (see ``similarity_attention``). softpick's
e^x / N is 2**(x - L). The query kernel goes first and leaves what the key kernel needs of a row:

    norm: 1 / N, or L for softpick        shift: c, or dO.out for softpick
    base: 2**-L for softpick              share: 1 / sum_j abs(f)

Each gradient is written by one program in a fixed order, so two runs agree bitwise.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import (
    bounds_of_tile,
    dot_rows,
    key_tiles,
    lane_sums,
    load_tile,
    query_tile,
    query_tiles,
    row_bounds,
    slope_of,
    store_tile,
    visible,
)
from kernels.similarity.fused.blocks import (
    hidden_score,
    reciprocal_of_sum,
    score_gradients,
    similarity_of,
    softpick_gradients,
    unit_of,
)


@triton.jit
def _query_gradients(
    dq0_MD, dq1_MD, q0_MD, q1_MD, dout0_ME, dout1_ME, norm_M, shift_M,
    k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M, factor, offset, slope,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what key tiles first_tile, ..., last_tile - 1 give to dQ / scale."""
    for tile in tl.range(first_tile, last_tile):
        j0 = tl.where(tile < low, 0, tile) * BN if PINNED and MASKED else tile * BN
        k0_ND = load_tile(k0, batch, j0, group, BN)
        k1_ND = load_tile(k1, batch, j0, group, BN) if k1 is not None else None
        v0_NE = load_tile(v0, batch, j0, group, BN)
        v1_NE = load_tile(v1, batch, j0, group, BN) if v1 is not None else None
        x_MN = dot_rows(q0_MD, q1_MD, k0_ND, k1_ND, PRECISION) * factor + offset
        dp_MN = dot_rows(dout0_ME, dout1_ME, v0_NE, v1_NE, PRECISION)
        j_N = j0 + tl.arange(0, BN)
        if HAS_SLOPES:
            x_MN += slope * (j_N[None, :] - i_M[:, None]).to(tl.float32)
        if MASKED:
            seen_MN = visible(
                i_M[:, None], j_N[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
            )
            x_MN = tl.where(seen_MN, x_MN, hidden_score(SIMILARITY))
        if SIMILARITY == "softpick":
            power_MN = tl.exp2(x_MN - norm_M[:, None])
            base_M1 = tl.exp2(-norm_M)[:, None]
            dx_MN = softpick_gradients(power_MN, base_M1, dp_MN, shift_M[:, None])
        else:
            dx_MN = score_gradients(
                x_MN, dp_MN, norm_M[:, None], shift_M[:, None], SIMILARITY, NORMALIZE
            )
        # The others have a derivative of 0 at a hidden score.
        if MASKED and SIMILARITY == "identity":
            dx_MN = tl.where(seen_MN, dx_MN, 0.0)
        dx_MN = dx_MN.to(k0_ND.dtype)
        dq0_MD = tl.dot(dx_MN, k0_ND, dq0_MD, input_precision=PRECISION)
        if k1 is not None:
            dq1_MD = tl.dot(dx_MN, k1_ND, dq1_MD, input_precision=PRECISION)
    return dq0_MD, dq1_MD


@triton.jit
def query_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1, dout0, dout1, dq0, dq1,
    start_ptr, stop_ptr, bounds_ptr, slopes_ptr, abs_ptr, sum_ptr,
    norm_ptr, shift_ptr, base_ptr, share_ptr,
    num_tokens, num_heads, heads_per_group, scale, bias,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B H). Reads abs and sum, softpick's L or what N is made of, [B, H, T].

    Writes dq, and for the key kernel those of norm, shift, base and share that aren't None,
    [B, H, T].
    """
    m, batch, head, group, i_M = query_tile(num_heads, heads_per_group, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    bounds = bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM)
    extra, low, full_low, full_high, high = key_tiles(bounds, m, num_tokens, CAUSAL, PINNED, BM, BN)

    exists_M = i_M < num_tokens
    row_M = tl.program_id(1).to(tl.int64) * num_tokens + i_M
    dout0_ME = load_tile(dout0, batch, m * BM, head, BM)
    dout1_ME = load_tile(dout1, batch, m * BM, head, BM) if dout1 is not None else None
    norm_M = tl.full([BM], 1.0, tl.float32)
    shift_M = tl.zeros([BM], tl.float32)
    if NORMALIZE != "none":
        out0_ME = load_tile(out0, batch, m * BM, head, BM)
        shift_M = tl.sum(out0_ME.to(tl.float32) * dout0_ME.to(tl.float32), 1)
        if out1 is not None:
            out1_ME = load_tile(out1, batch, m * BM, head, BM)
            shift_M += tl.sum(out1_ME.to(tl.float32) * dout1_ME.to(tl.float32), 1)
        sum_M = tl.load(sum_ptr + row_M, mask=exists_M, other=0.0)
        if SIMILARITY == "softpick":
            norm_M = sum_M
            tl.store(base_ptr + row_M, tl.exp2(-norm_M), mask=exists_M)
        else:
            norm_M = reciprocal_of_sum(sum_M)
            shift_M *= norm_M
            if NORMALIZE == "clamped_sum":
                shift_M = tl.where(tl.abs(sum_M) > 1.0, shift_M, 0.0)
                norm_M = 1.0 / tl.maximum(tl.abs(sum_M), 1.0)
            tl.store(norm_ptr + row_M, norm_M, mask=exists_M)
        tl.store(shift_ptr + row_M, shift_M, mask=exists_M)
    if share_ptr is not None:
        abs_M = tl.load(abs_ptr + row_M, mask=exists_M, other=0.0)
        tl.store(share_ptr + row_M, reciprocal_of_sum(abs_M), mask=exists_M)

    q0_MD = load_tile(q0, batch, m * BM, head, BM)
    q1_MD = load_tile(q1, batch, m * BM, head, BM) if q1 is not None else None
    factor = scale * unit_of(SIMILARITY)
    offset = bias * unit_of(SIMILARITY)
    slope = slope_of(slopes_ptr, head, unit_of(SIMILARITY), HAS_SLOPES)
    dq0_MD = tl.zeros([BM, D0], tl.float32)
    dq1_MD = tl.zeros([BM, D1], tl.float32)
    # Unless causal tiles that need the mask, then tiles that don't, then more that do.
    edges = (low - extra, full_low, full_high, high)
    for part in tl.static_range(1 if CAUSAL else 0, 3):
        dq0_MD, dq1_MD = _query_gradients(
            dq0_MD, dq1_MD, q0_MD, q1_MD, dout0_ME, dout1_ME, norm_M, shift_M, k0, k1, v0, v1,
            batch, group, low, edges[part], edges[part + 1], i_M, start_M, stop_M,
            factor, offset, slope, SIMILARITY, NORMALIZE, part != 1, CAUSAL, PINNED, HAS_SLOPES,
            BN, PRECISION,
        )  # fmt: skip
    store_tile(dq0, batch, m * BM, head, dq0_MD * scale)
    if dq1 is not None:
        store_tile(dq1, batch, m * BM, head, dq1_MD * scale)


@triton.jit
def _row_values(ptr, i_M, num_tokens, PAST: tl.constexpr, EVEN: tl.constexpr):
    """What stands for a tile's queries; PAST for rows past the end."""
    mask_M = None if EVEN else i_M < num_tokens
    return tl.load(ptr + i_M, mask=mask_M, other=None if EVEN else PAST)


@triton.jit
def _key_gradients(
    dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8, k0_ND, k1_ND, v0_NE, v1_NE,
    q0, q1, dout0, dout1,
    start_ptr, stop_ptr, norm_ptr, shift_ptr, base_ptr, share_ptr, row_offset,
    batch, head, first_tile, last_tile, j_N, num_tokens, factor, offset, slope,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    GRADIENTS: tl.constexpr, MEASURE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what query tiles first_tile, ..., last_tile - 1 give to dK / scale, dV and key mass."""
    for tile in tl.range(first_tile, last_tile):
        i0 = tile * BM
        i_M = i0 + tl.arange(0, BM)
        q0_MD = load_tile(q0, batch, i0, head, BM)
        q1_MD = load_tile(q1, batch, i0, head, BM) if q1 is not None else None
        x_NM = dot_rows(k0_ND, k1_ND, q0_MD, q1_MD, PRECISION) * factor + offset
        if HAS_SLOPES:
            x_NM += slope * (j_N[:, None] - i_M[None, :]).to(tl.float32)
        if MASKED:
            start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
            seen_NM = visible(
                i_M[None, :], j_N[:, None], start_M[None, :], stop_M[None, :], CAUSAL, PINNED
            )
            x_NM = tl.where(seen_NM, x_NM, hidden_score(SIMILARITY))
        # Rows past the end: q and dout are 0 there, so gradients are, whatever the weights; a share
        # of 0 takes them out of the key mass.
        norm_M = None
        if SIMILARITY == "softpick":
            norm_M = _row_values(norm_ptr, i_M, num_tokens, float("inf"), EVEN)
            base_M = _row_values(base_ptr, i_M, num_tokens, 0.0, EVEN)
            power_NM = tl.exp2(x_NM - norm_M[None, :])
            p_NM = tl.maximum(power_NM - base_M[None, :], 0.0)
        else:
            p_NM = similarity_of(x_NM, SIMILARITY)
            if norm_ptr is not None:
                norm_M = _row_values(norm_ptr, i_M, num_tokens, 0.0, EVEN)
        if MEASURE and share_ptr is not None:
            share_M = _row_values(share_ptr, i_M, num_tokens, 0.0, EVEN)
            mass_N8 += lane_sums(tl.abs(p_NM) * share_M[None, :])
        if SIMILARITY != "softpick" and norm_ptr is not None:
            p_NM *= norm_M[None, :]
        if MEASURE and share_ptr is None:
            mass_N8 += lane_sums(p_NM)
        if GRADIENTS:
            dout0_ME = load_tile(dout0, batch, i0, head, BM)
            dout1_ME = load_tile(dout1, batch, i0, head, BM) if dout1 is not None else None
            p_NM = p_NM.to(q0_MD.dtype)
            dv0_NE = tl.dot(p_NM, dout0_ME, dv0_NE, input_precision=PRECISION)
            if dout1 is not None:
                dv1_NE = tl.dot(p_NM, dout1_ME, dv1_NE, input_precision=PRECISION)
            dx_NM = dot_rows(v0_NE, v1_NE, dout0_ME, dout1_ME, PRECISION)
            if NORMALIZE == "none":
                dx_NM = score_gradients(x_NM, dx_NM, None, None, SIMILARITY, NORMALIZE)
            else:
                shift_1M = _row_values(shift_ptr, i_M, num_tokens, 0.0, EVEN)[None, :]
                if SIMILARITY == "softpick":
                    dx_NM = softpick_gradients(power_NM, base_M[None, :], dx_NM, shift_1M)
                else:
                    dx_NM = score_gradients(
                        x_NM, dx_NM, norm_M[None, :], shift_1M, SIMILARITY, NORMALIZE
                    )
            if MASKED and SIMILARITY == "identity":
                dx_NM = tl.where(seen_NM, dx_NM, 0.0)
            dx_NM = dx_NM.to(q0_MD.dtype)
            dk0_ND = tl.dot(dx_NM, q0_MD, dk0_ND, input_precision=PRECISION)
            if q1 is not None:
                dk1_ND = tl.dot(dx_NM, q1_MD, dk1_ND, input_precision=PRECISION)
    return dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8


@triton.jit
def key_kernel(
    q0, q1, k0, k1, v0, v1, dout0, dout1, dk0, dk1, dv0, dv1,
    start_ptr, stop_ptr, plan_ptr, slopes_ptr,
    norm_ptr, shift_ptr, base_ptr, share_ptr, mass_ptr,
    num_tokens, num_groups, heads_per_group, scale, bias,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    GRADIENTS: tl.constexpr, MEASURE: tl.constexpr, EVEN: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, B G). Writes dk and dv, summed over the group's heads in order, and, if
    MEASURE, key_mass [B, H, T]. Without GRADIENTS it rebuilds P for the key mass alone.

    norm, shift, base, share: [B, H, T]. None: norm and shift of weights that nothing divides, base
    of any but softpick, and share where the weights over N are P already.
    """
    n = tl.program_id(0)
    batch = tl.program_id(1) // num_groups
    group = tl.program_id(1) % num_groups
    num_heads = num_groups * heads_per_group
    row_offset = batch.to(tl.int64) * num_tokens
    edges = query_tiles(plan_ptr, batch, n, num_tokens, CAUSAL, BM, BN)

    j_N = n * BN + tl.arange(0, BN)
    k0_ND = load_tile(k0, batch, n * BN, group, BN)
    k1_ND = load_tile(k1, batch, n * BN, group, BN) if k1 is not None else None
    v0_NE = load_tile(v0, batch, n * BN, group, BN) if GRADIENTS else None
    v1_NE = load_tile(v1, batch, n * BN, group, BN) if v1 is not None else None
    factor = scale * unit_of(SIMILARITY)
    offset = bias * unit_of(SIMILARITY)
    dk0_ND = tl.zeros([BN, D0], tl.float32)
    dk1_ND = tl.zeros([BN, D1], tl.float32)
    dv0_NE = tl.zeros([BN, E0], tl.float32)
    dv1_NE = tl.zeros([BN, E1], tl.float32)
    for member in range(heads_per_group):
        head = group * heads_per_group + member
        row = (batch * num_heads + head).to(tl.int64) * num_tokens
        norms = norm_ptr + row if norm_ptr is not None else None
        shifts = shift_ptr + row if shift_ptr is not None else None
        bases = base_ptr + row if base_ptr is not None else None
        shares = share_ptr + row if share_ptr is not None else None
        mass_N8 = tl.zeros([BN, 8], tl.float32)
        slope = slope_of(slopes_ptr, head, unit_of(SIMILARITY), HAS_SLOPES)
        # Tiles that need the mask, tiles that don't and, unless causal, more that do.
        for part in tl.static_range(2 if CAUSAL else 3):
            dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8 = _key_gradients(
                dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8, k0_ND, k1_ND, v0_NE, v1_NE,
                q0, q1, dout0, dout1,
                start_ptr, stop_ptr, norms, shifts, bases, shares, row_offset,
                batch, head, edges[part], edges[part + 1],
                j_N, num_tokens, factor, offset, slope, SIMILARITY, NORMALIZE,
                part != 1, CAUSAL, PINNED, HAS_SLOPES, GRADIENTS, MEASURE, EVEN, BM, PRECISION,
            )  # fmt: skip
        if MEASURE:
            tl.store(mass_ptr + row + j_N, tl.sum(mass_N8, 1), mask=j_N < num_tokens)
    if GRADIENTS:
        store_tile(dk0, batch, n * BN, group, dk0_ND * scale)
        store_tile(dv0, batch, n * BN, group, dv0_NE)
        if dk1 is not None:
            store_tile(dk1, batch, n * BN, group, dk1_ND * scale)
        if dv1 is not None:
            store_tile(dv1, batch, n * BN, group, dv1_NE)
