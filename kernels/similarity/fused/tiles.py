"""Tile shapes of the kernels, by head dim: fixed, so that sums keep their order from run to run."""

from __future__ import annotations

import torch

from kernels.attention.fused.tiles import Tile

_INTERPRETED = Tile(queries=32, keys=16, warps=4, stages=1)
# fp32 is for tests; its tiles take twice the shared memory.
_FP32 = Tile(queries=32, keys=32, warps=4, stages=1)
_WIDE_FP32 = Tile(queries=16, keys=16, warps=4, stages=1)

# By largest head dim and kernel; those of attention's table where it has one for the portable
# kernels of an H100, but with two buffers from head dim 65 on, for cards with 99 KB to share.
# 128 registers let four programs share a multiprocessor.
_TILES = {
    64: {
        "forward": Tile(queries=64, keys=64, warps=4, stages=3, registers=128),
        "query": Tile(queries=64, keys=64, warps=4, stages=3),
        "key": Tile(queries=32, keys=64, warps=4, stages=2),
        "key_mass": Tile(queries=64, keys=64, warps=4, stages=3),
    },
    128: {
        "forward": Tile(queries=64, keys=64, warps=4, stages=2),
        "query": Tile(queries=64, keys=64, warps=4, stages=2),
        "key": Tile(queries=32, keys=64, warps=4, stages=2),
        "key_mass": Tile(queries=64, keys=64, warps=4, stages=2),
    },
    256: {
        "forward": Tile(queries=64, keys=32, warps=4, stages=2),
        "query": Tile(queries=64, keys=32, warps=4, stages=2),
        # Gradients of 64 keys and values, 512 columns of fp32, are more than four warps hold.
        "key": Tile(queries=32, keys=64, warps=8, stages=2),
        "key_mass": Tile(queries=32, keys=64, warps=4, stages=2),
    },
}


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Tile:
    """The tile of ``forward``, ``query``, ``key`` or ``key_mass``.

    head_dim: the larger of the query/key and the value head dim, at most 256.
    """
    if device.type != "cuda":
        return _INTERPRETED
    if dtype.itemsize > 2:
        return _FP32 if head_dim <= 128 else _WIDE_FP32
    return next(tiles for widest, tiles in _TILES.items() if head_dim <= widest)[kernel]
