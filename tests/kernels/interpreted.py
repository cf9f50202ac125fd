"""What the tests in Triton's interpreter share: small tiles, and masks that need several of them.

Axes: B rows of the batch, T query positions.
"""

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

from kernels.attention import checks
from kernels.attention.fused import tiles
from kernels.attention.fused.tiles import Tile, override_tiles
from kernels.masks import IntervalMask

IN_INTERPRETER = [
    pytest.mark.skipif(not checks.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
    # The kernels compute what `where` then drops; NumPy warns of it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def tiled(queries: int, keys: int):
    """All kernels with tiles of this shape."""
    tile = Tile(queries=queries, keys=keys, warps=4, stages=1)
    return override_tiles(**dict.fromkeys(tiles.KERNELS, tile))


def rows(*lengths: int) -> list[list[int]]:
    """One row of documents of these lengths."""
    return [[n for n, length in enumerate(lengths, 1) for _ in range(length)]]


def documents(*lengths: int, **settings) -> IntervalMask:
    row = torch.tensor(rows(*lengths))
    if settings.get("pinned"):
        row[:, 0] = 0
    return IntervalMask.from_documents(row, **settings)


def any_intervals(num_tokens: int, pinned: int, seed: int) -> IntervalMask:
    """Non-monotone rows; some see the pinned key alone, some nothing, some everything."""
    generator = torch.Generator().manual_seed(seed)
    ends_2BT = torch.randint(
        0, num_tokens + 1, (2, 1, num_tokens), generator=generator, dtype=torch.int32
    )
    start_BT, stop_BT = ends_2BT.amin(0), ends_2BT.amax(0)
    start_BT[:, ::5] = stop_BT[:, ::5] = 0
    start_BT[:, ::7] = stop_BT[:, ::7] = num_tokens // 2
    # A whole tile of queries whatever its size, of each sort.
    start_BT[:, 16:32], stop_BT[:, 16:32] = 0, num_tokens
    start_BT[:, 32:48] = stop_BT[:, 32:48] = num_tokens - 1
    return IntervalMask(
        start_BT=start_BT,
        stop_BT=stop_BT,
        document_start_BT=torch.arange(num_tokens, dtype=torch.int32)[None] // 6 * 6,
        pinned=pinned,
    )


TILED_MASKS = {
    "causal": IntervalMask.causal(1, 61),
    "documents": documents(33, 1, 1, 26),
    "documents-padding": IntervalMask.from_documents(torch.tensor([[1] * 37 + [-1] * 24])),
    "causal_across": documents(9, 30, 22, causal_across=True),
    "pinned-window": documents(33, 1, 27, pinned=1).window(20),
    "prefix": IntervalMask.causal(1, 61).prefix(50),
    "any_intervals-pinned": any_intervals(61, pinned=1, seed=0),
}


@st.composite
def random_masks(draw) -> IntervalMask:
    """Documents of 1 token and more, padding, then a window, a prefix, a pinned key or none."""
    lengths = draw(st.lists(st.just(1) | st.integers(1, 40), min_size=1, max_size=4))
    pinned = draw(st.integers(0, 1))
    row_1T = torch.tensor([rows(*lengths)[0] + [-1] * draw(st.integers(0, 20))])
    row_1T[:, 0] *= 1 - pinned
    mask = IntervalMask.from_documents(row_1T, pinned=pinned, causal_across=draw(st.booleans()))
    if draw(st.booleans()):
        mask = mask.window(draw(st.integers(1, 20)))
    if draw(st.booleans()):
        mask = mask.prefix(draw(st.integers(0, 20)))
    return mask


# The fixtures keep nothing from one example to the next.
STATELESS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
SMALL_SHAPES = st.sampled_from([(16, 16), (16, 32), (32, 16)])
