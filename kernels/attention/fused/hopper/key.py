"""The key kernel for Hopper: what ``kernels.attention.fused.backward.key_kernel`` computes.

Each consumer warpgroup holds 64 keys; all share the query tiles that the producer brings in, with
their log sums and shifts, so a tile is read once for 64 GROUPS keys.

Axes: N = 64 keys of a warpgroup, M query rows of a tile, D head dim, in parts D0 and D1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.attention.fused.blocks import LOG2_E
from kernels.attention.fused.hopper.pieces import (
    ROWS,
    barriers,
    copy_in,
    flat,
    lane_sums,
    left_operand,
    mma_rows,
    products,
    visible,
)


@gluon.jit
def _tiles_of_keys(
    plan_ptr, batch, n, num_tokens, CAUSAL: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr
):
    """Query tiles that see a block of 64 GROUPS keys: (low, high, full_low, full_high)."""
    if CAUSAL:
        low = n * ROWS * GROUPS // BM
        high = gl.cdiv(num_tokens, BM)
        full_low, full_high = high, high
    else:
        plan = plan_ptr + (batch * gl.num_programs(0) + n) * 4
        low, high = gl.load(plan), gl.load(plan + 1)
        full_low, full_high = gl.load(plan + 2), gl.load(plan + 3)
    return low, high, full_low, full_high


@gluon.jit
def _producer(
    k0, k1, v0, v1, q0, q1, dout0, dout1, log_sum, shift, start, stop,
    tiles, rows, kv_full, full, empty, plan_ptr,
    batch, n, group, num_groups, heads_per_group, num_tokens,
    CAUSAL: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    k0_s, k1_s, v0_s, v1_s, q0_s, q1_s, dout0_s, dout1_s = tiles
    log_sum_s, shift_s, start_s, stop_s = rows
    BYTES: gl.constexpr = (D0 + D1) * 2
    ROW_BYTES: gl.constexpr = BM * 4 * (2 if CAUSAL else 4)
    low, high, _, _ = _tiles_of_keys(plan_ptr, batch, n, num_tokens, CAUSAL, BM, GROUPS)
    mbarrier.expect(kv_full, 2 * GROUPS * ROWS * BYTES)
    for w in gl.static_range(GROUPS):
        j0 = (n * GROUPS + w) * ROWS
        copy_in(k0, k1, batch, j0, group, kv_full, k0_s.index(w), k1_s.index(w), D1)
        copy_in(v0, v1, batch, j0, group, kv_full, v0_s.index(w), v1_s.index(w), D1)
    i = 0
    for member in range(heads_per_group):
        head = group * heads_per_group + member
        row = batch * num_groups * heads_per_group + head
        for m in range(low, high):
            stage = i % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * BM * BYTES + ROW_BYTES)
            copy_in(q0, q1, batch, m * BM, head, bar, q0_s.index(stage), q1_s.index(stage), D1)
            copy_in(
                dout0, dout1, batch, m * BM, head, bar,
                dout0_s.index(stage), dout1_s.index(stage), D1,
            )  # fmt: skip
            tma.async_copy_global_to_shared(log_sum, [row, m * BM], bar, log_sum_s.index(stage))
            tma.async_copy_global_to_shared(shift, [row, m * BM], bar, shift_s.index(stage))
            if not CAUSAL:
                tma.async_copy_global_to_shared(start, [batch, m * BM], bar, start_s.index(stage))
                tma.async_copy_global_to_shared(stop, [batch, m * BM], bar, stop_s.index(stage))
            i += 1


@gluon.jit
def _consumer(
    w: gl.constexpr, dk0, dk1, dv0, dv1,
    tiles, rows, kv_full, full, empty, plan_ptr, mass_ptr,
    batch, n, group, num_groups, heads_per_group, num_tokens, scale,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, MEASURE: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    k0_s, k1_s, v0_s, v1_s, q0_s, q1_s, dout0_s, dout1_s = tiles
    log_sum_s, shift_s, start_s, stop_s = rows
    LX: gl.constexpr = products(BM)
    L0: gl.constexpr = products(D0)
    L1: gl.constexpr = products(D1 if D1 > 0 else 16)
    LC: gl.constexpr = gl.SliceLayout(0, LX)
    # Products in flight behind the one that is waited for.
    PARTS: gl.constexpr = 2 if D1 > 0 else 1
    dtype: gl.constexpr = k0_s.dtype
    factor = scale * LOG2_E
    low, high, full_low, full_high = _tiles_of_keys(
        plan_ptr, batch, n, num_tokens, CAUSAL, BM, GROUPS
    )
    j0 = (n * GROUPS + w) * ROWS
    j_N = j0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LX))
    m_M = gl.arange(0, BM, layout=LC)
    zero_NM = gl.zeros([ROWS, BM], gl.float32, LX)
    dk0_ND = warpgroup_mma_init(gl.zeros([ROWS, D0], gl.float32, L0))
    dv0_ND = warpgroup_mma_init(gl.zeros([ROWS, D0], gl.float32, L0))
    dk1_ND = warpgroup_mma_init(gl.zeros([ROWS, D1 if D1 > 0 else 16], gl.float32, L1))
    dv1_ND = warpgroup_mma_init(gl.zeros([ROWS, D1 if D1 > 0 else 16], gl.float32, L1))
    k0_w, k1_w = flat(k0_s.index(w)), flat(k1_s.index(w))
    v0_w, v1_w = flat(v0_s.index(w)), flat(v1_s.index(w))
    mbarrier.wait(kv_full, 0)
    i = 0
    for member in range(heads_per_group):
        mass_N4 = lane_sums(zero_NM)
        for m in range(low, high):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            q0_t, q1_t = flat(q0_s.index(stage)), flat(q1_s.index(stage))
            dout0_t, dout1_t = flat(dout0_s.index(stage)), flat(dout1_s.index(stage))
            x_NM = mma_rows(k0_w, k1_w, q0_t, q1_t, zero_NM, D1)
            dp_NM = mma_rows(v0_w, v1_w, dout0_t, dout1_t, zero_NM, D1)
            log_sum_M = log_sum_s.index(stage).reshape([BM]).load(LC)
            if OVERLAP:
                # The last tile's products are done too: its buffers can go.
                x_NM, dk0_ND, dv0_ND = warpgroup_mma_wait(PARTS, deps=(x_NM, dk0_ND, dv0_ND))
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
            else:
                x_NM = warpgroup_mma_wait(PARTS, deps=(x_NM,))
            p_NM = gl.exp2(x_NM * factor - log_sum_M[None, :])
            if CAUSAL:
                if m * BM < j0 + ROWS - 1:
                    p_NM = gl.where((m * BM + m_M)[None, :] >= j_N[:, None], p_NM, 0.0)
            else:
                if (m < full_low) | (m >= full_high):
                    start_M = start_s.index(stage).reshape([BM]).load(LC)
                    stop_M = stop_s.index(stage).reshape([BM]).load(LC)
                    seen_NM = visible(
                        (m * BM + m_M)[None, :],
                        j_N[:, None],
                        start_M[None, :],
                        stop_M[None, :],
                        CAUSAL,
                        PINNED,
                    )
                    p_NM = gl.where(seen_NM, p_NM, 0.0)
            if MEASURE:
                mass_N4 += lane_sums(p_NM)
            p_a = gl.convert_layout(p_NM.to(dtype), left_operand(D0))
            dv0_ND = warpgroup_mma(p_a, dout0_t, dv0_ND, is_async=True)
            if D1 > 0:
                p_b = gl.convert_layout(p_a, left_operand(D1))
                dv1_ND = warpgroup_mma(p_b, dout1_t, dv1_ND, is_async=True)
            shift_M = shift_s.index(stage).reshape([BM]).load(LC)
            dp_NM = warpgroup_mma_wait(PARTS, deps=(dp_NM,))
            ds_NM = p_NM * (dp_NM - shift_M[None, :])
            ds_a = gl.convert_layout(ds_NM.to(dtype), left_operand(D0))
            dk0_ND = warpgroup_mma(ds_a, q0_t, dk0_ND, is_async=True)
            if D1 > 0:
                ds_b = gl.convert_layout(ds_a, left_operand(D1))
                dk1_ND = warpgroup_mma(ds_b, q1_t, dk1_ND, is_async=True)
            if not OVERLAP:
                # Products in flight keep their operands' registers, and there may be none to spare.
                dk0_ND, dv0_ND = warpgroup_mma_wait(0, deps=(dk0_ND, dv0_ND))
                dk0_ND, dv0_ND = warpgroup_mma_init(dk0_ND), warpgroup_mma_init(dv0_ND)
                if D1 > 0:
                    dk1_ND, dv1_ND = warpgroup_mma_wait(0, deps=(dk1_ND, dv1_ND))
                    dk1_ND, dv1_ND = warpgroup_mma_init(dk1_ND), warpgroup_mma_init(dv1_ND)
                mbarrier.arrive(empty.index(stage), count=1)
            i += 1
        if MEASURE:
            head = group * heads_per_group + member
            row = batch * num_groups * heads_per_group + head
            mass_N = gl.convert_layout(gl.sum(mass_N4, 1), gl.SliceLayout(1, LX))
            gl.store(mass_ptr + row.to(gl.int64) * num_tokens + j_N, mass_N, mask=j_N < num_tokens)
    dk0_ND, dv0_ND = warpgroup_mma_wait(0, deps=(dk0_ND, dv0_ND))
    # The keys' and values' buffers are free now.
    k0_w.store((dk0_ND * scale).to(dtype))
    v0_w.store(dv0_ND.to(dtype))
    if D1 > 0:
        dk1_ND, dv1_ND = warpgroup_mma_wait(0, deps=(dk1_ND, dv1_ND))
        k1_w.store((dk1_ND * scale).to(dtype))
        v1_w.store(dv1_ND.to(dtype))
    fence_async_shared()
    if j0 < num_tokens:
        tma.async_copy_shared_to_global(dk0, [batch, j0, group, 0], k0_s.index(w))
        tma.async_copy_shared_to_global(dv0, [batch, j0, group, 0], v0_s.index(w))
        if D1 > 0:
            tma.async_copy_shared_to_global(dk1, [batch, j0, group, 0], k1_s.index(w))
            tma.async_copy_shared_to_global(dv1, [batch, j0, group, 0], v1_s.index(w))
    tma.store_wait(0)


@gluon.jit
def key_kernel(
    q0, q1, k0, k1, v0, v1, dout0, dout1, dk0, dk1, dv0, dv1, log_sum, shift, start, stop,
    plan_ptr, mass_ptr, num_tokens, num_groups, heads_per_group, scale,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, MEASURE: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, OVERLAP: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of 64 GROUPS keys, B G). log_sum and shift are descriptors [B H, T rounded up],
    start and stop [B, T]; the plan is for query tiles of BM and blocks of keys.
    """
    n = gl.program_id(0)
    batch = gl.program_id(1) // num_groups
    group = gl.program_id(1) % num_groups
    dtype: gl.constexpr = q0.dtype
    k0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], k0.layout)
    v0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], v0.layout)
    q0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D0], q0.layout)
    dout0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D0], dout0.layout)
    # One part covers most head dims; the second buffers are then the first's.
    k1_s, v1_s, q1_s, dout1_s = k0_s, v0_s, q0_s, dout0_s
    if D1 > 0:
        k1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], k1.layout)
        v1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], v1.layout)
        q1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D1], q1.layout)
        dout1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, 1, D1], dout1.layout)
    log_sum_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], log_sum.layout)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], shift.layout)
    start_s, stop_s = log_sum_s, shift_s
    if not CAUSAL:
        start_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1, BM], start.layout)
        stop_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1, BM], stop.layout)
    kv_full = barriers(1, 1).index(0)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, GROUPS)
    fence_async_shared()
    tiles = (k0_s, k1_s, v0_s, v1_s, q0_s, q1_s, dout0_s, dout1_s)
    rows = (log_sum_s, shift_s, start_s, stop_s)
    # GROUPS consumers, then the producer: one list, since Triton can't add lists that hold None.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    w, dk0, dk1, dv0, dv1, tiles, rows, kv_full, full, empty,
                    plan_ptr, mass_ptr, batch, n, group,
                    num_groups, heads_per_group, num_tokens, scale,
                    CAUSAL, PINNED, MEASURE, D0, D1, BM, STAGES, GROUPS, OVERLAP,
                ),
            )
            if w < GROUPS
            else (
                _producer,
                (
                    k0, k1, v0, v1, q0, q1, dout0, dout1, log_sum, shift, start, stop,
                    tiles, rows, kv_full, full, empty, plan_ptr,
                    batch, n, group, num_groups, heads_per_group, num_tokens,
                    CAUSAL, D0, D1, BM, STAGES, GROUPS,
                ),
            )
            for w in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4, 4, 1][3 - GROUPS :],
        [REGISTERS, REGISTERS, 24][3 - GROUPS :],
    )  # fmt: skip
