"""What the Triton kernels share: loading a tile, products over a head dim in two parts, visibility.

A tile's edges are powers of two, a head dim need not be. A head dim of 96 is held as a part of 64
and a part of 32, each a tile of its own, so that no product runs over padding; the second part is
None where the first covers it all.

Axes: M query rows and N keys of a tile, D query/key head dim, E value head dim. Scores are in
units of log 2 (x = s log2 e), since the hardware's exponential is 2**x.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

HIDDEN = tl.constexpr(-2e30)
NEVER = tl.constexpr(-1e30)
"""A hidden key's score, and the running maximum before any score: finite, so that no difference of
infinities arises, and far enough apart that 2**(HIDDEN - NEVER) is 0."""


@triton.jit
def load_tile(part, batch, token, head, ROWS: tl.constexpr):
    """[ROWS, width] of one part, zeros past the end of the row."""
    return part.load([batch, token, head, 0]).reshape(ROWS, part.block_shape[3])


@triton.jit
def store_tile(part, batch, token, head, tile):
    """Write [rows, width]; what lies past the end of the row is dropped."""
    part.store([batch, token, head, 0], tile.to(part.dtype).reshape(part.block_shape))


@triton.jit
def dot_rows(a0, a1, b0, b1, PRECISION: tl.constexpr):
    """a b^T over both parts of the axis they share, fp32: [rows of a, rows of b]."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if a1 is not None:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def lane_sums(x):
    """[rows, n] -> [rows, 8], whose sum is the row's: each thread of four adds up what it holds.

    A matrix unit's product has its rows over four neighbouring threads, two columns in turn;
    [rows, 8] has the same owners, so this needs no exchange. Loops keep these and exchange once, at
    the end.
    """
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@triton.jit
def visible(i, j, start, stop, CAUSAL: tl.constexpr, PINNED: tl.constexpr):
    """Whether query i sees key j: the rule of ``IntervalMask``; the shapes broadcast."""
    if CAUSAL:
        sees = i >= j
    else:
        sees = (j >= start) & (j < stop)
        if PINNED:
            sees = sees | ((j == 0) & (stop > 0))
    return sees


@triton.jit
def query_tile(num_heads, heads_per_group, BM: tl.constexpr):
    """What a program of a grid (query tiles, B H) owns: (m, batch, head, group, i_M)."""
    # The last tiles see most keys under a causal mask: heavy work first fills the card evenly.
    m = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    group = head // heads_per_group
    return m, batch, head, group, m * BM + tl.arange(0, BM)


@triton.jit
def bounds_of_tile(bounds_ptr, batch, m, num_tokens, BM: tl.constexpr):
    """Pointer to a query tile's row of the table that ``tables.bounds`` makes; 0 without one."""
    bounds = 0
    if bounds_ptr is not None:
        # A tile of padding past the last one sees nothing, whatever it visits.
        num_tiles = tl.cdiv(num_tokens, BM)
        bounds = bounds_ptr + (batch * num_tiles + tl.minimum(m, num_tiles - 1)) * 8
    return bounds


@triton.jit
def key_tiles(
    bounds, m, num_tokens,
    CAUSAL: tl.constexpr, PINNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The key tiles a tile of queries visits: (extra, low, full_low, full_high, high).

    Tiles low, ..., high - 1 are visited, those from full_low to full_high - 1 need no mask, and
    extra is 1 if tile 0, which holds the pinned key, is visited beside them.
    """
    if CAUSAL:
        extra, low, full_low = 0, 0, 0
        full_high = (m * BM + 1) // BN
        high = tl.minimum(tl.cdiv((m + 1) * BM, BN), tl.cdiv(num_tokens, BN))
    else:
        low_key, high_key = tl.load(bounds), tl.load(bounds + 1)
        # Rows that see the pinned key alone have no interval: tile 0 is then the extra one.
        low = tl.where(low_key < high_key, low_key // BN, 1)
        high = tl.maximum(tl.cdiv(high_key, BN), low)
        full_low = tl.minimum(tl.maximum(tl.cdiv(tl.load(bounds + 2), BN), low), high)
        full_high = tl.minimum(tl.maximum(tl.load(bounds + 3) // BN, full_low), high)
        extra = tl.where(low > 0, tl.load(bounds + 4), 0) if PINNED else 0
    return extra, low, full_low, full_high, high


@triton.jit
def query_tiles(
    plan_ptr, batch, n, num_tokens, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The query tiles that see a tile of keys: (low, full_low, full_high, high).

    Tiles low, ..., high - 1 are visited; those from full_low to full_high - 1 need no mask.
    """
    if CAUSAL:
        low = n * BN // BM
        high = tl.cdiv(num_tokens, BM)
        full_low = tl.minimum(tl.cdiv((n + 1) * BN - 1, BM), high)
        full_high = high
    else:
        plan = plan_ptr + (batch * tl.num_programs(0) + n) * 4
        low, high = tl.load(plan), tl.load(plan + 1)
        full_low, full_high = tl.load(plan + 2), tl.load(plan + 3)
    return low, full_low, full_high, high


@triton.jit
def row_bounds(start_ptr, stop_ptr, offset, i, num_tokens, CAUSAL: tl.constexpr):
    """start and stop of a tile's queries; a row past the end is empty."""
    if CAUSAL:
        start, stop = i * 0, i + 1
    else:
        exists = i < num_tokens
        start = tl.load(start_ptr + offset + i, mask=exists, other=0)
        stop = tl.load(stop_ptr + offset + i, mask=exists, other=0)
    return start, stop


@triton.jit
def slope_of(slopes_ptr, head, unit, HAS_SLOPES: tl.constexpr):
    """A head's slope, where ``unit`` turns scores into the kernels' unit; 0 without slopes."""
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * unit
    return slope


@triton.jit
def load_keys(
    k_ptr, key_M, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """One key a query, [M, WIDTH] from FIRST on along the head dim; key -1 gives any."""
    d_D = FIRST + tl.arange(0, WIDTH)
    k_ptrs = k_ptr + tl.maximum(key_M, 0).to(tl.int64)[:, None] * stride + d_D[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        k_MD = tl.load(k_ptrs, mask=(d_D < HEAD_DIM)[None, :], other=0.0)
    else:
        k_MD = tl.load(k_ptrs)
    return k_MD
