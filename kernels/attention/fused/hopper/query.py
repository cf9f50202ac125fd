"""The query kernel for Hopper: what ``kernels.attention.fused.backward.query_kernel`` computes.

Axes: M = 64 query rows of a warpgroup, N keys of a tile, D head dim, in parts D0 and D1.
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
    left_operand,
    mma_rows,
    products,
    visible,
)
from kernels.attention.fused.hopper.steps import own_steps, tile_of_step, tiles_of_block


@gluon.jit
def _producer(
    q0, q1, k0, k1, v0, v1, out0, out1, dout0, dout1, tiles, q_full, full, empty, bounds_ptr,
    batch, block, num_tiles, head, group, num_tokens,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    q0_s, q1_s, out0_s, out1_s, dout0_s, dout1_s, k0_s, k1_s, v0_s, v1_s = tiles
    BYTES: gl.constexpr = (D0 + D1) * 2
    low, high, extra = tiles_of_block(
        bounds_ptr, batch, block, num_tiles, num_tokens, CAUSAL, PINNED, GROUPS, BN
    )
    for w in gl.static_range(GROUPS):
        row0 = (block * GROUPS + w) * ROWS
        bar = q_full.index(w)
        mbarrier.expect(bar, 3 * ROWS * BYTES)
        copy_in(dout0, dout1, batch, row0, head, bar, dout0_s.index(w), dout1_s.index(w), D1)
        copy_in(out0, out1, batch, row0, head, bar, out0_s.index(w), out1_s.index(w), D1)
        copy_in(q0, q1, batch, row0, head, bar, q0_s.index(w), q1_s.index(w), D1)
    for i in range(high - low + extra):
        j0 = tile_of_step(i, low, high) * BN
        stage = i % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, 2 * BN * BYTES)
        copy_in(k0, k1, batch, j0, group, bar, k0_s.index(stage), k1_s.index(stage), D1)
        copy_in(v0, v1, batch, j0, group, bar, v0_s.index(stage), v1_s.index(stage), D1)


@gluon.jit
def _skip(full, empty, first, last, STAGES: gl.constexpr):
    """Let steps first, ..., last - 1, which this warpgroup doesn't need, pass by."""
    for i in range(first, last):
        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(empty.index(i % STAGES), count=1)


@gluon.jit
def _consumer(
    w: gl.constexpr, dq0, dq1, tiles, q_full, full, empty, pointers, place,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, HAS_DLSE: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    q0_s, q1_s, out0_s, out1_s, dout0_s, dout1_s, k0_s, k1_s, v0_s, v1_s = tiles
    bounds_ptr, start_ptr, stop_ptr, lse_ptr, dlse_ptr, log_sum_ptr, shift_ptr = pointers
    batch, block, num_tiles, head, num_tokens, num_rows, scale = place
    LX: gl.constexpr = products(BN)
    L0: gl.constexpr = products(D0)
    L1: gl.constexpr = products(D1 if D1 > 0 else 16)
    R: gl.constexpr = gl.SliceLayout(1, LX)
    # Products in flight behind the one that is waited for.
    PARTS: gl.constexpr = 2 if D1 > 0 else 1
    dtype: gl.constexpr = q0_s.dtype
    factor = scale * LOG2_E
    tile = block * GROUPS + w
    row0 = tile * ROWS
    i_M = row0 + gl.arange(0, ROWS, layout=R)
    exists_M = i_M < num_tokens
    n_N = gl.arange(0, BN, layout=gl.SliceLayout(0, LX))
    low, high, extra = tiles_of_block(
        bounds_ptr, batch, block, num_tiles, num_tokens, CAUSAL, PINNED, GROUPS, BN
    )
    count = high - low + extra
    begin, end, full_low, full_high = own_steps(
        bounds_ptr, batch, tile, num_tiles, num_tokens, low, high, count, CAUSAL, PINNED, BN
    )
    start_M, stop_M = i_M, i_M
    if not CAUSAL:
        start_M = gl.load(start_ptr + i_M, mask=exists_M, other=0)
        stop_M = gl.load(stop_ptr + i_M, mask=exists_M, other=0)
    lse_M = gl.load(lse_ptr + i_M, mask=exists_M, other=float("-inf"))
    is_empty_M = lse_M == float("-inf")
    log_sum_M = gl.where(is_empty_M, float("inf"), lse_M * LOG2_E)

    mbarrier.wait(q_full.index(w), 0)
    q0_w, q1_w = flat(q0_s.index(w)), flat(q1_s.index(w))
    dout0_w, dout1_w = flat(dout0_s.index(w)), flat(dout1_s.index(w))
    out_MD = flat(out0_s.index(w)).load(L0).to(gl.float32)
    shift_M = gl.convert_layout(gl.sum(out_MD * dout0_w.load(L0).to(gl.float32), 1), R)
    if D1 > 0:
        out_MD = flat(out1_s.index(w)).load(L1).to(gl.float32)
        shift_M += gl.convert_layout(gl.sum(out_MD * dout1_w.load(L1).to(gl.float32), 1), R)
    if HAS_DLSE:
        dlse_M = gl.load(dlse_ptr + i_M, mask=exists_M, other=0.0)
        shift_M -= gl.where(is_empty_M, 0.0, dlse_M)
    gl.store(log_sum_ptr + i_M, log_sum_M, mask=i_M < num_rows)
    gl.store(shift_ptr + i_M, shift_M, mask=i_M < num_rows)

    zero_MN = gl.zeros([ROWS, BN], gl.float32, LX)
    dq0_MD = warpgroup_mma_init(gl.zeros([ROWS, D0], gl.float32, L0))
    dq1_MD = warpgroup_mma_init(gl.zeros([ROWS, D1 if D1 > 0 else 16], gl.float32, L1))
    _skip(full, empty, 0, begin, STAGES)
    for i in range(begin, end):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        k0_t, k1_t = flat(k0_s.index(stage)), flat(k1_s.index(stage))
        v0_t, v1_t = flat(v0_s.index(stage)), flat(v1_s.index(stage))
        x_MN = mma_rows(q0_w, q1_w, k0_t, k1_t, zero_MN, D1)
        dp_MN = mma_rows(dout0_w, dout1_w, v0_t, v1_t, zero_MN, D1)
        if OVERLAP:
            # The last tile's products are done too: its buffers can go.
            x_MN, dq0_MD = warpgroup_mma_wait(PARTS, deps=(x_MN, dq0_MD))
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > begin)
        else:
            x_MN = warpgroup_mma_wait(PARTS, deps=(x_MN,))
        p_MN = gl.exp2(x_MN * factor - log_sum_M[:, None])
        t = tile_of_step(i, low, high)
        if (t < full_low) | (t >= full_high):
            seen_MN = visible(
                i_M[:, None], (t * BN + n_N)[None, :], start_M[:, None], stop_M[:, None],
                CAUSAL, PINNED,
            )  # fmt: skip
            p_MN = gl.where(seen_MN, p_MN, 0.0)
        dp_MN = warpgroup_mma_wait(0, deps=(dp_MN,))
        ds_MN = p_MN * (dp_MN - shift_M[:, None])
        ds_a = gl.convert_layout(ds_MN.to(dtype), left_operand(D0))
        dq0_MD = warpgroup_mma(ds_a, k0_t, dq0_MD, is_async=True)
        if D1 > 0:
            ds_b = gl.convert_layout(ds_a, left_operand(D1))
            dq1_MD = warpgroup_mma(ds_b, k1_t, dq1_MD, is_async=True)
        if not OVERLAP:
            dq0_MD = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(dq0_MD,)))
            if D1 > 0:
                dq1_MD = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(dq1_MD,)))
            mbarrier.arrive(empty.index(stage), count=1)
    dq0_MD = warpgroup_mma_wait(0, deps=(dq0_MD,))
    if OVERLAP:
        mbarrier.arrive(empty.index((end + STAGES - 1) % STAGES), count=1, pred=end > begin)
    _skip(full, empty, gl.maximum(begin, end), count, STAGES)
    # The queries' buffer is free now.
    q0_w.store((dq0_MD * scale).to(dtype))
    if D1 > 0:
        dq1_MD = warpgroup_mma_wait(0, deps=(dq1_MD,))
        q1_w.store((dq1_MD * scale).to(dtype))
    fence_async_shared()
    if row0 < num_tokens:
        tma.async_copy_shared_to_global(dq0, [batch, row0, head, 0], q0_s.index(w))
        if D1 > 0:
            tma.async_copy_shared_to_global(dq1, [batch, row0, head, 0], q1_s.index(w))
    tma.store_wait(0)


@gluon.jit
def query_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1, dout0, dout1, dq0, dq1,
    start_ptr, stop_ptr, bounds_ptr, lse_ptr, dlse_ptr, log_sum_ptr, shift_ptr,
    num_tokens, num_rows, num_heads, heads_per_group, scale,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, HAS_DLSE: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, OVERLAP: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of 64 GROUPS queries, B H). Writes what the portable kernel writes."""
    block = gl.num_programs(0) - 1 - gl.program_id(0)
    batch = gl.program_id(1) // num_heads
    head = gl.program_id(1) % num_heads
    group = head // heads_per_group
    num_tiles = gl.cdiv(num_tokens, ROWS)
    dtype: gl.constexpr = q0.dtype
    q0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], q0.layout)
    out0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], q0.layout)
    dout0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], q0.layout)
    k0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D0], k0.layout)
    v0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D0], v0.layout)
    # One part covers most head dims; the second buffers are then the first's.
    q1_s, out1_s, dout1_s, k1_s, v1_s = q0_s, out0_s, dout0_s, k0_s, v0_s
    if D1 > 0:
        q1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], q1.layout)
        out1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], q1.layout)
        dout1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], q1.layout)
        k1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D1], k1.layout)
        v1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D1], v1.layout)
    q_full = barriers(GROUPS, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, GROUPS)
    fence_async_shared()

    if not CAUSAL:
        start_ptr += batch.to(gl.int64) * num_tokens
        stop_ptr += batch.to(gl.int64) * num_tokens
    row = gl.program_id(1).to(gl.int64)
    lse_ptr += row * num_tokens
    if HAS_DLSE:
        dlse_ptr += row * num_tokens
    log_sum_ptr += row * num_rows
    shift_ptr += row * num_rows
    tiles = (q0_s, q1_s, out0_s, out1_s, dout0_s, dout1_s, k0_s, k1_s, v0_s, v1_s)
    pointers = (bounds_ptr, start_ptr, stop_ptr, lse_ptr, dlse_ptr, log_sum_ptr, shift_ptr)
    place = (batch, block, num_tiles, head, num_tokens, num_rows, scale)
    # GROUPS consumers, then the producer: one list, since Triton can't add lists that hold None.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    w, dq0, dq1, tiles, q_full, full, empty, pointers, place,
                    CAUSAL, PINNED, D0, D1, BN, STAGES, GROUPS, HAS_DLSE, OVERLAP,
                ),
            )
            if w < GROUPS
            else (
                _producer,
                (
                    q0, q1, k0, k1, v0, v1, out0, out1, dout0, dout1,
                    tiles, q_full, full, empty, bounds_ptr,
                    batch, block, num_tiles, head, group, num_tokens,
                    CAUSAL, PINNED, D0, D1, BN, STAGES, GROUPS,
                ),
            )
            for w in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4, 4, 1][3 - GROUPS :],
        [REGISTERS, REGISTERS, 24][3 - GROUPS :],
    )  # fmt: skip
