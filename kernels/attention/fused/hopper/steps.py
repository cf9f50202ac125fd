"""Which key tiles the warpgroups of a block of queries visit, and in what order.

A block brings in key tiles high - 1, ..., low, then tile 0 once more if it holds the pinned key and
low > 0: one step each. A warpgroup computes in the steps that its own 64 queries need.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.fused.hopper.pieces import ROWS


@gluon.jit
def tiles_of_block(
    bounds_ptr, batch, block, num_tiles, num_tokens,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Key tiles that GROUPS tiles of 64 queries visit together: (low, high, extra).

    extra is 1 if tile 0, with the pinned key, is visited after tiles high - 1, ..., low.
    """
    if CAUSAL:
        low, extra = 0, 0
        high = gl.minimum(gl.cdiv((block + 1) * ROWS * GROUPS, BN), gl.cdiv(num_tokens, BN))
    else:
        low_key, high_key, any_row = num_tokens, 0, 0
        for w in gl.static_range(GROUPS):
            tile = gl.minimum(block * GROUPS + w, num_tiles - 1)
            bounds = bounds_ptr + (batch * num_tiles + tile) * 8
            low_key = gl.minimum(low_key, gl.load(bounds))
            high_key = gl.maximum(high_key, gl.load(bounds + 1))
            any_row = gl.maximum(any_row, gl.load(bounds + 4))
        low = gl.where(low_key < high_key, low_key // BN, 1)
        high = gl.maximum(gl.cdiv(high_key, BN), low)
        extra = gl.where(low > 0, any_row, 0) if PINNED else 0
    return low, high, extra


@gluon.jit
def tile_of_step(step, low, high):
    """The key tile of a step."""
    tile = high - 1 - step
    return gl.where(tile < low, 0, tile)


@gluon.jit
def own_steps(
    bounds_ptr, batch, tile, num_tiles, num_tokens, low, high, count,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Steps that 64 queries need: (begin, end, full_low, full_high).

    They are begin, ..., end - 1 of the block's ``count``; all queries see all of key tiles
    full_low, ..., full_high - 1.
    """
    row0 = tile * ROWS
    if CAUSAL:
        begin = high - gl.minimum(gl.cdiv(row0 + ROWS, BN), high)
        end = count
        full_low, full_high = 0, (row0 + 1) // BN
    else:
        bounds = bounds_ptr + (batch * num_tiles + gl.minimum(tile, num_tiles - 1)) * 8
        low_key, high_key = gl.load(bounds), gl.load(bounds + 1)
        begin = gl.where(low_key < high_key, high - gl.cdiv(high_key, BN), 0)
        end = gl.where(low_key < high_key, high - low_key // BN, 0)
        if PINNED:
            end = gl.where(gl.load(bounds + 4) > 0, count, end)
        full_low = gl.cdiv(gl.load(bounds + 2), BN)
        full_high = gl.load(bounds + 3) // BN
    # A tile past the end of the row needs nothing.
    end = gl.where(row0 < num_tokens, end, begin)
    return begin, end, full_low, full_high
