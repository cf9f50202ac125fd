"""How the CPU attention cuts its work: tiles of query rows, their masks and their memory.

Axes: B rows of the batch, T query positions, S key positions (S = T), H query heads, G key/value
heads, D any head dim. In a tile, b = rows of the batch, r = query rows, c = keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.masks import interval_sees

BLOCK_ROWS = 64
TILE_ELEMENTS = 2**20
"""Largest number of probabilities worked on at once, unless one row of the batch has more."""


class Tile(NamedTuple):
    """Rows of the batch ``b``, query rows ``r``, keys ``c``, and where P lies in what is kept."""

    b: slice
    r: slice
    c: slice
    kept: slice


@dataclass
class TiledMask:
    """An ``IntervalMask`` as a custom operator receives it."""

    start_BT: Tensor
    stop_BT: Tensor
    pinned: int
    is_causal: bool

    def tiles(self, num_heads: int) -> Iterator[Tile]:
        batch_size, num_tokens = self.start_BT.shape
        rows = _batch_rows(num_heads, num_tokens)
        kept = 0
        for b0 in range(0, batch_size, rows):
            b = slice(b0, min(b0 + rows, batch_size))
            for r0 in range(0, num_tokens, BLOCK_ROWS):
                r = slice(r0, min(r0 + BLOCK_ROWS, num_tokens))
                c = slice(0, r.stop) if self.is_causal else self._keys(b, r)
                if c.stop > c.start:
                    size = (b.stop - b.start) * num_heads * (r.stop - r.start) * (c.stop - c.start)
                    yield Tile(b, r, c, slice(kept, kept + size))
                    kept += size

    @cached_property
    def hidden_later(self) -> Tensor:
        """-inf above the diagonal of a block, else 0."""
        return torch.full((BLOCK_ROWS, BLOCK_ROWS), -torch.inf).triu_(1)

    def _keys(self, b: slice, r: slice) -> slice:
        """The keys that some query of a block sees, as one range."""
        start_BT, stop_BT = self.start_BT[b, r], self.stop_BT[b, r]
        stop = int(stop_BT.max())
        if self.pinned:
            return slice(0, stop)
        return slice(int(start_BT.masked_fill(start_BT == stop_BT, stop).min()), stop)

    @cached_property
    def empty_BT(self) -> Tensor | None:
        """Which queries see nothing; None if there are none."""
        if self.is_causal:
            return None
        num_visible_BT = self.stop_BT - self.start_BT + self.start_BT.clamp(max=self.pinned)
        empty_BT = num_visible_BT == 0
        return empty_BT if bool(empty_BT.any()) else None

    def hide_(self, scores_bHrc: Tensor, tile: Tile) -> None:
        """Set hidden scores to -inf."""
        if self.is_causal:
            num_rows = tile.r.stop - tile.r.start
            scores_bHrc[..., -num_rows:].add_(self.hidden_later[:num_rows, :num_rows])
            return
        start_b1r1 = self.start_BT[tile.b, None, tile.r, None]
        stop_b1r1 = self.stop_BT[tile.b, None, tile.r, None]
        key_c = torch.arange(tile.c.start, tile.c.stop, dtype=torch.int32)
        visible_b1rc = interval_sees(start_b1r1, stop_b1r1, self.pinned, key_c)
        scores_bHrc.add_(scores_bHrc.new_zeros(()).where(visible_b1rc, -torch.inf))

    def empty_(self, x_bHrc: Tensor, tile: Tile) -> None:
        """Set the rows that see nothing to 0."""
        if self.empty_BT is not None:
            x_bHrc.masked_fill_(self.empty_BT[tile.b, None, tile.r, None], 0)


def _batch_rows(num_heads: int, num_tokens: int) -> int:
    return max(1, TILE_ELEMENTS // (num_heads * min(BLOCK_ROWS, num_tokens) * num_tokens))


def max_probabilities(num_tokens: int, is_causal: bool) -> int:
    """An upper bound for the size of all tiles of a head that needs no look at the mask."""
    if is_causal:
        return num_tokens * (num_tokens + BLOCK_ROWS) // 2
    return num_tokens * num_tokens


def tile_memory(q_BTHD: Tensor) -> Tensor:
    """Uninitialised memory for the largest tile."""
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    one_row = num_heads * min(BLOCK_ROWS, num_tokens) * num_tokens
    return q_BTHD.new_empty(min(batch_size, _batch_rows(num_heads, num_tokens)) * one_row)


def heads_first(x_BTGD: Tensor, num_heads: int, scale: float = 1.0) -> Tensor:
    """[B, H, T, D], contiguous; key/value heads are repeated for their query heads."""
    batch_size, num_tokens, num_groups, dim = x_BTGD.shape
    x_BGHTD = x_BTGD.new_empty(batch_size, num_groups, num_heads // num_groups, num_tokens, dim)
    torch.mul(x_BTGD.transpose(1, 2)[:, :, None].expand_as(x_BGHTD), scale, out=x_BGHTD)
    return x_BGHTD.view(batch_size, num_heads, num_tokens, dim)


def tokens_first(x_BHSD: Tensor, num_groups: int, scale: float = 1.0) -> Tensor:
    """[B, S, G, D], contiguous, summed over the query heads of a group, times ``scale``."""
    x_BGHSD = x_BHSD.unflatten(1, (num_groups, -1))
    x_BGSD = x_BGHSD.squeeze(2) if x_BGHSD.shape[2] == 1 else x_BGHSD.sum(2)
    batch_size, _, num_tokens, dim = x_BGSD.shape
    x_BSGD = x_BGSD.new_empty(batch_size, num_tokens, num_groups, dim)
    return torch.mul(x_BGSD.transpose(1, 2), scale, out=x_BSGD)
