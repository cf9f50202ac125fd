"""What the Hopper kernels share: barriers, tiles in two parts, visibility.

A program holds several warpgroups. One warp, the producer, only issues bulk copies; each consumer
warpgroup owns 64 rows and computes at its own pace, so that one's exponentials run while another's
products do. They meet in shared memory alone: a buffer has a barrier that says it is full and one
that counts the consumers that have left it.

A register operand that stays the same over a loop is not used: ptxas of CUDA 12.8 lets it be
overwritten while the product that reads it is in flight, or else runs every product serially.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
)

ROWS = gl.constexpr(64)
"""Rows a warpgroup owns: the height of its matrix instruction."""


@gluon.constexpr_function
def products(rows_of_b):
    """Layout of a warpgroup's [64, rows_of_b] product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_of_b, 16])


@gluon.constexpr_function
def left_operand(width):
    """Layout of [64, N] registers that enter a product [64, width] from the left."""
    return gl.DotOperandLayout(0, products(width), 2)


@gluon.jit
def barriers(COUNT: gl.constexpr, arrivals: gl.constexpr):
    """COUNT barriers that take ``arrivals`` each."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(COUNT):
        mbarrier.init(bars.index(j), count=arrivals)
    return bars


@gluon.jit
def copy_in(part0, part1, batch, token, head, bar, buffer0, buffer1, D1: gl.constexpr):
    """Start copying both parts of a tile; ``bar`` must expect their bytes."""
    tma.async_copy_global_to_shared(part0, [batch, token, head, 0], bar, buffer0)
    if D1 > 0:
        tma.async_copy_global_to_shared(part1, [batch, token, head, 0], bar, buffer1)


@gluon.jit
def flat(buffer):
    """A tile [1, rows, 1, width] as [rows, width]."""
    return buffer.reshape([buffer.type.shape[1], buffer.type.shape[3]])


@gluon.jit
def mma_rows(a0, a1, b0, b1, zero, D1: gl.constexpr):
    """Start a b^T over both parts of the axis they share: [64, rows of b]."""
    product = warpgroup_mma(a0, b0.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1 > 0:
        product = warpgroup_mma(a1, b1.permute((1, 0)), product, is_async=True)
    return product


@gluon.jit
def lane_sums(x):
    """[64, n] -> [64, 4], whose sum is the row's: what each thread of four holds of it.

    Adding up what a thread holds needs no exchange; loops keep these and exchange once at the end.
    The long axis goes first: a sum of products is then a chain of fused multiply-adds.
    """
    return gl.sum(gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]), 1), 2)


@gluon.jit
def of_lanes(row, lanes):
    """A value a row, as a column beside lane sums."""
    return gl.convert_layout(row, gl.SliceLayout(1, lanes.type.layout))[:, None]


@gluon.jit
def visible(i, j, start, stop, CAUSAL: gl.constexpr, PINNED: gl.constexpr):
    """Whether query i sees key j: the rule of ``IntervalMask``; the shapes broadcast."""
    if CAUSAL:
        sees = i >= j
    else:
        sees = (j >= start) & (j < stop)
        if PINNED:
            sees = sees | ((j == 0) & (stop > 0))
    return sees
