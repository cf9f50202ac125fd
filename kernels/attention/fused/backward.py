"""The backward kernels: gradients of the queries, then of the keys and values with the key mass.

With P rebuilt from lse, and scale folded into the last step,

    dS_ij = P_ij (dP_ij - shift_i)       dP = dO V^T       shift_i = dO_i.out_i - dlse_i
    dQ = scale dS K      dK = scale dS^T Q      dV = P^T dO      key_mass_k = sum_i P_ik

The query kernel goes first: it has dO at hand, so it computes shift on the way. The key kernel
holds a tile of keys against all queries that see it, which is where P's column sums cost one sum.
Each gradient is written by one program in a fixed order, so two runs agree bitwise.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import (
    LOG2_E,
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


@triton.jit
def _query_gradients(
    dq0_MD, dq1_MD, q0_MD, q1_MD, dout0_ME, dout1_ME, log_sum_M, shift_M,
    k0, k1, v0, v1,
    batch, group, low, first_tile, last_tile, i_M, start_M, stop_M, factor, slope,
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
        x_MN = dot_rows(q0_MD, q1_MD, k0_ND, k1_ND, PRECISION)
        dp_MN = dot_rows(dout0_ME, dout1_ME, v0_NE, v1_NE, PRECISION)
        j_N = j0 + tl.arange(0, BN)
        x_MN = x_MN * factor - log_sum_M[:, None]
        if HAS_SLOPES:
            x_MN += slope * (j_N[None, :] - i_M[:, None]).to(tl.float32)
        p_MN = tl.exp2(x_MN)
        if MASKED:
            seen_MN = visible(
                i_M[:, None], j_N[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
            )
            p_MN = tl.where(seen_MN, p_MN, 0.0)
        ds_MN = (p_MN * (dp_MN - shift_M[:, None])).to(k0_ND.dtype)
        dq0_MD = tl.dot(ds_MN, k0_ND, dq0_MD, input_precision=PRECISION)
        if k1 is not None:
            dq1_MD = tl.dot(ds_MN, k1_ND, dq1_MD, input_precision=PRECISION)
    return dq0_MD, dq1_MD


@triton.jit
def query_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1, dout0, dout1, dq0, dq1,
    start_ptr, stop_ptr, bounds_ptr, slopes_ptr, lse_ptr, dlse_ptr, log_sum_ptr, shift_ptr,
    num_tokens, num_rows, num_heads, heads_per_group, scale,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B H). Writes dq, and for the key kernel log_sum = lse log2 e and shift,
    [B, H, num_rows]; log_sum is inf in an empty row and in rows past num_tokens, so that every P
    there is 0.
    """
    m, batch, head, group, i_M = query_tile(num_heads, heads_per_group, BM)
    row_offset = batch.to(tl.int64) * num_tokens
    start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
    bounds = bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM)
    extra, low, full_low, full_high, high = key_tiles(bounds, m, num_tokens, CAUSAL, PINNED, BM, BN)

    exists_M = i_M < num_tokens
    row_M = tl.program_id(1).to(tl.int64) * num_tokens + i_M
    lse_M = tl.load(lse_ptr + row_M, mask=exists_M, other=float("-inf"))
    log_sum_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M * LOG2_E)
    dout0_ME = load_tile(dout0, batch, m * BM, head, BM)
    dout1_ME = load_tile(dout1, batch, m * BM, head, BM) if dout1 is not None else None
    out0_ME = load_tile(out0, batch, m * BM, head, BM)
    shift_M = tl.sum(out0_ME.to(tl.float32) * dout0_ME.to(tl.float32), 1)
    if out1 is not None:
        out1_ME = load_tile(out1, batch, m * BM, head, BM)
        shift_M += tl.sum(out1_ME.to(tl.float32) * dout1_ME.to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_M = tl.load(dlse_ptr + row_M, mask=exists_M, other=0.0)
        shift_M -= tl.where(lse_M == float("-inf"), 0.0, dlse_M)
    row_M = tl.program_id(1).to(tl.int64) * num_rows + i_M
    tl.store(log_sum_ptr + row_M, log_sum_M, mask=i_M < num_rows)
    tl.store(shift_ptr + row_M, shift_M, mask=i_M < num_rows)

    q0_MD = load_tile(q0, batch, m * BM, head, BM)
    q1_MD = load_tile(q1, batch, m * BM, head, BM) if q1 is not None else None
    factor = scale * LOG2_E
    slope = slope_of(slopes_ptr, head, LOG2_E, HAS_SLOPES)
    dq0_MD = tl.zeros([BM, D0], tl.float32)
    dq1_MD = tl.zeros([BM, D1], tl.float32)
    # Unless causal tiles that need the mask, then tiles that don't, then more that do.
    edges = (low - extra, full_low, full_high, high)
    for part in tl.static_range(1 if CAUSAL else 0, 3):
        dq0_MD, dq1_MD = _query_gradients(
            dq0_MD, dq1_MD, q0_MD, q1_MD, dout0_ME, dout1_ME, log_sum_M, shift_M, k0, k1, v0, v1,
            batch, group, low, edges[part], edges[part + 1], i_M, start_M, stop_M, factor, slope,
            part != 1, CAUSAL, PINNED, HAS_SLOPES, BN, PRECISION,
        )  # fmt: skip
    store_tile(dq0, batch, m * BM, head, dq0_MD * scale)
    if dq1 is not None:
        store_tile(dq1, batch, m * BM, head, dq1_MD * scale)


@triton.jit
def _key_gradients(
    dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8, k0_ND, k1_ND, v0_NE, v1_NE,
    q0, q1, dout0, dout1,
    start_ptr, stop_ptr, log_sum_ptr, shift_ptr, row_offset,
    batch, head, first_tile, last_tile, j_N, num_tokens, factor, slope,
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
        # Rows past the end are all zeros; a log sum of infinity takes them out of every sum.
        if EVEN:
            log_sum_M = tl.load(log_sum_ptr + i_M)
        else:
            log_sum_M = tl.load(log_sum_ptr + i_M, mask=i_M < num_tokens, other=float("inf"))
        x_NM = dot_rows(k0_ND, k1_ND, q0_MD, q1_MD, PRECISION)
        x_NM = x_NM * factor - log_sum_M[None, :]
        if HAS_SLOPES:
            x_NM += slope * (j_N[:, None] - i_M[None, :]).to(tl.float32)
        p_NM = tl.exp2(x_NM)
        if MASKED:
            start_M, stop_M = row_bounds(start_ptr, stop_ptr, row_offset, i_M, num_tokens, CAUSAL)
            seen_NM = visible(
                i_M[None, :], j_N[:, None], start_M[None, :], stop_M[None, :], CAUSAL, PINNED
            )
            p_NM = tl.where(seen_NM, p_NM, 0.0)
        if MEASURE:
            mass_N8 += lane_sums(p_NM)
        if GRADIENTS:
            if EVEN:
                shift_M = tl.load(shift_ptr + i_M)
            else:
                shift_M = tl.load(shift_ptr + i_M, mask=i_M < num_tokens, other=0.0)
            dout0_ME = load_tile(dout0, batch, i0, head, BM)
            dout1_ME = load_tile(dout1, batch, i0, head, BM) if dout1 is not None else None
            dv0_NE = tl.dot(p_NM.to(q0_MD.dtype), dout0_ME, dv0_NE, input_precision=PRECISION)
            if dout1 is not None:
                dv1_NE = tl.dot(p_NM.to(q0_MD.dtype), dout1_ME, dv1_NE, input_precision=PRECISION)
            dp_NM = dot_rows(v0_NE, v1_NE, dout0_ME, dout1_ME, PRECISION)
            ds_NM = (p_NM * (dp_NM - shift_M[None, :])).to(q0_MD.dtype)
            dk0_ND = tl.dot(ds_NM, q0_MD, dk0_ND, input_precision=PRECISION)
            if q1 is not None:
                dk1_ND = tl.dot(ds_NM, q1_MD, dk1_ND, input_precision=PRECISION)
    return dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8


@triton.jit
def key_kernel(
    q0, q1, k0, k1, v0, v1, dout0, dout1, dk0, dk1, dv0, dv1,
    start_ptr, stop_ptr, plan_ptr, slopes_ptr, log_sum_ptr, shift_ptr, mass_ptr,
    num_tokens, num_rows, num_groups, heads_per_group, scale,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, HAS_SLOPES: tl.constexpr,
    GRADIENTS: tl.constexpr, MEASURE: tl.constexpr, EVEN: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, B G). Writes dk and dv, summed over the group's heads in order, and, if
    MEASURE, key_mass [B, H, T]. Without GRADIENTS it rebuilds P for the key mass alone.
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
    factor = scale * LOG2_E
    dk0_ND = tl.zeros([BN, D0], tl.float32)
    dk1_ND = tl.zeros([BN, D1], tl.float32)
    dv0_NE = tl.zeros([BN, E0], tl.float32)
    dv1_NE = tl.zeros([BN, E1], tl.float32)
    for member in range(heads_per_group):
        head = group * heads_per_group + member
        row = (batch * num_heads + head).to(tl.int64)
        log_sums = log_sum_ptr + row * num_rows
        shifts = shift_ptr + row * num_rows if GRADIENTS else None
        mass_N8 = tl.zeros([BN, 8], tl.float32)
        slope = slope_of(slopes_ptr, head, LOG2_E, HAS_SLOPES)
        # Tiles that need the mask, tiles that don't and, unless causal, more that do.
        for part in tl.static_range(2 if CAUSAL else 3):
            dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8 = _key_gradients(
                dk0_ND, dk1_ND, dv0_NE, dv1_NE, mass_N8, k0_ND, k1_ND, v0_NE, v1_NE,
                q0, q1, dout0, dout1,
                start_ptr, stop_ptr, log_sums, shifts, row_offset,
                batch, head, edges[part], edges[part + 1], j_N, num_tokens, factor, slope,
                part != 1, CAUSAL, PINNED, HAS_SLOPES, GRADIENTS, MEASURE, EVEN, BM, PRECISION,
            )  # fmt: skip
        if MEASURE:
            tl.store(mass_ptr + row * num_tokens + j_N, tl.sum(mass_N8, 1), mask=j_N < num_tokens)
    if GRADIENTS:
        store_tile(dk0, batch, n * BN, group, dk0_ND * scale)
        store_tile(dv0, batch, n * BN, group, dv0_NE)
        if dk1 is not None:
            store_tile(dk1, batch, n * BN, group, dk1_ND * scale)
        if dv1 is not None:
            store_tile(dv1, batch, n * BN, group, dv1_NE)
