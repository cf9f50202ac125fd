"""The forward kernel for Hopper: what ``kernels.attention.fused.forward`` computes.

Within a warpgroup the scores of the next key tile are in flight together with the last tile's
P V (FlashAttention-3, arXiv 2407.08608); between warpgroups the hardware interleaves.

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

from kernels.attention.fused.blocks import LN_2, LOG2_E, NEVER
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
from kernels.attention.fused.hopper.softmax import soften
from kernels.attention.fused.hopper.steps import own_steps, tile_of_step, tiles_of_block


@gluon.jit
def _producer(
    q0, q1, k0, k1, v0, v1, q0_s, q1_s, k0_s, k1_s, v0_s, v1_s,
    q_full, k_full, k_empty, v_full, v_empty, bounds_ptr,
    batch, block, num_tiles, head, group, num_tokens,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (D0 + D1) * 2
    low, high, extra = tiles_of_block(
        bounds_ptr, batch, block, num_tiles, num_tokens, CAUSAL, PINNED, GROUPS, BN
    )
    for w in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(w), ROWS * BYTES)
        copy_in(
            q0, q1, batch, (block * GROUPS + w) * ROWS, head, q_full.index(w),
            q0_s.index(w), q1_s.index(w), D1,
        )  # fmt: skip
    for i in range(high - low + extra):
        j0 = tile_of_step(i, low, high) * BN
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BN * BYTES)
        copy_in(
            k0, k1, batch, j0, group, k_full.index(stage), k0_s.index(stage), k1_s.index(stage), D1
        )
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BN * BYTES)
        copy_in(
            v0, v1, batch, j0, group, v_full.index(stage), v0_s.index(stage), v1_s.index(stage), D1
        )


@gluon.jit
def _skip(k_full, k_empty, v_full, v_empty, first, last, STAGES: gl.constexpr):
    """Let tiles first, ..., last - 1, which this warpgroup doesn't need, pass by."""
    for i in range(first, last):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit
def _consumer(
    w: gl.constexpr, copies, pointers, place,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, HAS_NULL: gl.constexpr, MEASURE: gl.constexpr,
    ENTROPY: gl.constexpr, ONE_DOCUMENT: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    (
        out0, out1, q0_s, q1_s, k0_s, k1_s, v0_s, v1_s,
        q_full, k_full, k_empty, v_full, v_empty,
    ) = copies  # fmt: skip
    (
        bounds_ptr, start_ptr, stop_ptr, document_ptr, null_ptr, null_stride_t,
        lse_ptr, first_ptr, document_mass_ptr, null_mass_ptr, entropy_ptr, top_ptr,
    ) = pointers  # fmt: skip
    batch, block, num_tiles, head, num_tokens, scale = place
    LX: gl.constexpr = products(BN)
    L0: gl.constexpr = products(D0)
    L1: gl.constexpr = products(D1 if D1 > 0 else 16)
    R: gl.constexpr = gl.SliceLayout(1, LX)
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

    zero_MN = gl.zeros([ROWS, BN], gl.float32, LX)
    acc0 = gl.zeros([ROWS, D0], gl.float32, L0)
    acc1 = gl.zeros([ROWS, D1 if D1 > 0 else 16], gl.float32, L1)
    sum_M4 = lane_sums(zero_MN)
    spread_M4 = lane_sums(zero_MN)
    top_M = gl.full([ROWS], NEVER, gl.float32, R)
    first_M4 = lane_sums(zero_MN) + float("-inf")
    own_M4 = lane_sums(zero_MN)
    document_M, earliest, latest = i_M, 0, 0
    if MEASURE:  # noqa: SIM102
        if not ONE_DOCUMENT:
            document_M = gl.load(document_ptr + i_M, mask=exists_M, other=-1)
            bounds = bounds_ptr + (batch * num_tiles + gl.minimum(tile, num_tiles - 1)) * 8
            earliest, latest = gl.load(bounds + 5), gl.load(bounds + 6)
    q0_w, q1_w = flat(q0_s.index(w)), flat(q1_s.index(w))
    mbarrier.wait(q_full.index(w), 0)
    _skip(k_full, k_empty, v_full, v_empty, 0, begin, STAGES)
    if begin < end:
        stage = begin % STAGES
        mbarrier.wait(k_full.index(stage), (begin // STAGES) & 1)
        x_MN = mma_rows(q0_w, q1_w, flat(k0_s.index(stage)), flat(k1_s.index(stage)), zero_MN, D1)
        x_MN = warpgroup_mma_wait(0, deps=(x_MN,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        t = tile_of_step(begin, low, high)
        p_MN, rescale_M, sum_M4, top_M, spread_M4, first_M4, own_M4 = soften(
            x_MN, sum_M4, top_M, spread_M4, first_M4, own_M4, i_M, t * BN, n_N, start_M, stop_M,
            document_M, earliest, latest, factor, (t < full_low) | (t >= full_high),
            CAUSAL, PINNED, MEASURE, ENTROPY, ONE_DOCUMENT,
        )  # fmt: skip
        p_a = gl.convert_layout(p_MN.to(dtype), left_operand(D0))
        acc0 = warpgroup_mma_init(acc0)
        if D1 > 0:
            acc1 = warpgroup_mma_init(acc1)
        for i in range(begin + 1, end):
            stage = i % STAGES
            last = (i - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            x_MN = mma_rows(
                q0_w, q1_w, flat(k0_s.index(stage)), flat(k1_s.index(stage)), zero_MN, D1
            )
            mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
            acc0 = warpgroup_mma(p_a, flat(v0_s.index(last)), acc0, is_async=True)
            if D1 > 0:
                p_b = gl.convert_layout(p_a, left_operand(D1))
                acc1 = warpgroup_mma(p_b, flat(v1_s.index(last)), acc1, is_async=True)
                x_MN = warpgroup_mma_wait(2, deps=(x_MN,))
            else:
                x_MN = warpgroup_mma_wait(1, deps=(x_MN,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            t = tile_of_step(i, low, high)
            p_MN, rescale_M, sum_M4, top_M, spread_M4, first_M4, own_M4 = soften(
                x_MN, sum_M4, top_M, spread_M4, first_M4, own_M4, i_M, t * BN, n_N, start_M, stop_M,
                document_M, earliest, latest, factor, (t < full_low) | (t >= full_high),
                CAUSAL, PINNED, MEASURE, ENTROPY, ONE_DOCUMENT,
            )  # fmt: skip
            if D1 > 0:
                acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
                rescale_1 = gl.convert_layout(rescale_M, gl.SliceLayout(1, L1))
                acc1 = warpgroup_mma_init(acc1 * rescale_1[:, None])
            else:
                acc0 = warpgroup_mma_wait(0, deps=(acc0,))
            mbarrier.arrive(v_empty.index(last), count=1)
            rescale_0 = gl.convert_layout(rescale_M, gl.SliceLayout(1, L0))
            acc0 = warpgroup_mma_init(acc0 * rescale_0[:, None])
            p_a = gl.convert_layout(p_MN.to(dtype), left_operand(D0))
        last = (end - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((end - 1) // STAGES) & 1)
        acc0 = warpgroup_mma(p_a, flat(v0_s.index(last)), acc0, is_async=True)
        if D1 > 0:
            p_b = gl.convert_layout(p_a, left_operand(D1))
            acc1 = warpgroup_mma(p_b, flat(v1_s.index(last)), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
        mbarrier.arrive(v_empty.index(last), count=1)
    _skip(k_full, k_empty, v_full, v_empty, end, count, STAGES)

    # Everything from here on is once a tile.
    if MEASURE:  # noqa: SIM102
        if not ONE_DOCUMENT:
            own_M = gl.convert_layout(gl.sum(own_M4, 1), R)
            sees_M = visible(i_M, document_M, start_M, stop_M, CAUSAL, PINNED)
            own_M = gl.where((document_M >= 0) & sees_M, own_M, float("-inf"))
    # In the layout of the output's rows and in units of log 2. A row without a key has no null
    # slot either.
    RO: gl.constexpr = gl.SliceLayout(1, L0)
    i_M = row0 + gl.arange(0, ROWS, layout=RO)
    exists_M = i_M < num_tokens
    sum_M = gl.convert_layout(gl.sum(sum_M4, 1), RO)
    seen_M = sum_M > 0.0
    top_M = gl.where(seen_M, gl.convert_layout(top_M, RO) * factor, 0.0)
    log_sum_M = top_M + gl.log2(gl.where(seen_M, sum_M, 1.0))
    null_M = log_sum_M
    if HAS_NULL:
        null_M = gl.load(null_ptr + i_M.to(gl.int64) * null_stride_t, mask=exists_M, other=0.0)
        null_M = null_M.to(gl.float32) * LOG2_E
        high_M = gl.maximum(log_sum_M, null_M)
        log_sum_M = high_M + gl.log2(gl.exp2(log_sum_M - high_M) + gl.exp2(null_M - high_M))
    # P = p weight.
    weight_M = gl.where(seen_M, gl.exp2(top_M - log_sum_M), 0.0)
    gl.store(lse_ptr + i_M, gl.where(seen_M, log_sum_M * LN_2, float("-inf")), mask=exists_M)
    if MEASURE:
        log_sum_M = gl.where(seen_M, log_sum_M, float("inf"))
        top = gl.max(gl.where(seen_M & exists_M, top_M * LN_2, float("-inf")), 0)
        gl.store(top_ptr + tile, top)
        first_M = gl.convert_layout(gl.sum(first_M4, 1), RO) * factor
        gl.store(first_ptr + i_M, gl.exp2(first_M - log_sum_M), mask=exists_M)
        # An empty row has mass 0 there, padding included.
        if not ONE_DOCUMENT:
            own_M = gl.convert_layout(own_M, RO) * factor
            gl.store(document_mass_ptr + i_M, gl.exp2(own_M - log_sum_M), mask=exists_M)
        if HAS_NULL:
            null_mass_M = gl.exp2(null_M - log_sum_M)
            gl.store(null_mass_ptr + i_M, null_mass_M, mask=exists_M)
        if ENTROPY:
            # sum_j P_j (log_sum - x_j), relative to top: no difference of two large sums.
            spread_M = gl.convert_layout(gl.sum(spread_M4, 1), RO)
            sums_M = sum_M * (log_sum_M - top_M) - spread_M
            entropy_M = gl.where(seen_M, gl.maximum(sums_M * weight_M, 0.0), 0.0)
            if HAS_NULL:
                entropy_M += gl.where(null_mass_M > 0.0, null_mass_M * (log_sum_M - null_M), 0.0)
            gl.store(entropy_ptr + i_M, entropy_M * LN_2, mask=exists_M)

    # The queries' buffer is free now.
    q0_w.store((acc0 * weight_M[:, None]).to(dtype))
    if D1 > 0:
        weight_1 = gl.convert_layout(weight_M, gl.SliceLayout(1, L1))
        q1_w.store((acc1 * weight_1[:, None]).to(dtype))
    fence_async_shared()
    if row0 < num_tokens:
        tma.async_copy_shared_to_global(out0, [batch, row0, head, 0], q0_s.index(w))
        if D1 > 0:
            tma.async_copy_shared_to_global(out1, [batch, row0, head, 0], q1_s.index(w))
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q0, q1, k0, k1, v0, v1, out0, out1,
    start_ptr, stop_ptr, document_ptr, bounds_ptr,
    null_ptr, null_stride_b, null_stride_h, null_stride_t,
    lse_ptr, first_ptr, document_mass_ptr, null_mass_ptr, entropy_ptr, top_ptr,
    num_tokens, num_heads, heads_per_group, scale,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, HAS_NULL: gl.constexpr, MEASURE: gl.constexpr,
    ENTROPY: gl.constexpr, ONE_DOCUMENT: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of 64 GROUPS queries, B H). Writes what the portable kernel writes."""
    block = gl.num_programs(0) - 1 - gl.program_id(0)
    batch = gl.program_id(1) // num_heads
    head = gl.program_id(1) % num_heads
    group = head // heads_per_group
    num_tiles = gl.cdiv(num_tokens, ROWS)
    dtype: gl.constexpr = q0.dtype
    # One part covers most head dims; the second buffers are then the first's.
    q0_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D0], q0.layout)
    k0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D0], k0.layout)
    v0_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D0], v0.layout)
    q1_s, k1_s, v1_s = q0_s, k0_s, v0_s
    if D1 > 0:
        q1_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, ROWS, 1, D1], q1.layout)
        k1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D1], k1.layout)
        v1_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D1], v1.layout)
    q_full = barriers(GROUPS, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, GROUPS)
    v_empty = barriers(STAGES, GROUPS)
    fence_async_shared()

    row = batch.to(gl.int64) * num_tokens
    if not CAUSAL:
        start_ptr, stop_ptr = start_ptr + row, stop_ptr + row
    if MEASURE:
        document_ptr += row
    if HAS_NULL:
        null_ptr += batch.to(gl.int64) * null_stride_b + head.to(gl.int64) * null_stride_h
    row = gl.program_id(1).to(gl.int64) * num_tokens
    lse_ptr += row
    if MEASURE:
        first_ptr += row
        top_ptr += gl.program_id(1) * gl.num_programs(0) * GROUPS
        if not ONE_DOCUMENT:
            document_mass_ptr += row
        if HAS_NULL:
            null_mass_ptr += row
        if ENTROPY:
            entropy_ptr += row
    copies = (
        out0, out1, q0_s, q1_s, k0_s, k1_s, v0_s, v1_s,
        q_full, k_full, k_empty, v_full, v_empty,
    )  # fmt: skip
    pointers = (
        bounds_ptr, start_ptr, stop_ptr, document_ptr, null_ptr, null_stride_t,
        lse_ptr, first_ptr, document_mass_ptr, null_mass_ptr, entropy_ptr, top_ptr,
    )  # fmt: skip
    place = (batch, block, num_tiles, head, num_tokens, scale)
    # GROUPS consumers, then the producer: one list, since Triton can't add lists that hold None.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    w, copies, pointers, place,
                    CAUSAL, PINNED, HAS_NULL, MEASURE, ENTROPY, ONE_DOCUMENT,
                    D0, D1, BN, STAGES, GROUPS,
                ),
            )
            if w < GROUPS
            else (
                _producer,
                (
                    q0, q1, k0, k1, v0, v1, q0_s, q1_s, k0_s, k1_s, v0_s, v1_s,
                    q_full, k_full, k_empty, v_full, v_empty, bounds_ptr,
                    batch, block, num_tiles, head, group, num_tokens,
                    CAUSAL, PINNED, D0, D1, BN, STAGES, GROUPS,
                ),
            )
            for w in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4, 4, 1][3 - GROUPS :],
        [REGISTERS, REGISTERS, 24][3 - GROUPS :],
    )  # fmt: skip
