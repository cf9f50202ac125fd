"""Tokens written into packed rows: a fixed one, or random ones (arXiv 2410.10781, section 5).

They are written before labels are taken, into inputs and targets alike: the token before a written
one is labelled with it. Padding stays padding.

Axes: B rows, W = T + 1 (a row and the token after it).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data.packing import PackingConfig
from data.rows import RowArrays
from data.tokenizers import TextTokenizer
from kernels.errors import require

HELD_OUT = -1
"""Stands for the epoch of rows that are packed as in training, but held out."""


@dataclass(frozen=True)
class Interventions:
    """What is written where, as token ids; without settings, nothing.

    fixed_position, fixed_id: every row's token there is that one.
    random_positions: each row's tokens there are drawn from ``text_ids``, all of them equally
        likely, as a function of (data_seed, epoch, row, position) alone.
    """

    data_seed: int = 0
    fixed_position: int | None = None
    fixed_id: int = 0
    random_positions: list[int] = field(default_factory=list)
    text_ids: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, config: PackingConfig, tokenizer: TextTokenizer, data_seed: int) -> Interventions:
        """Those of a packing; raises ``UserError`` if ``packing.fixed_token`` is not one token."""
        fixed_id = 0
        if config.fixed_token is not None:
            fixed_id = tokenizer.token_id(config.fixed_token)
            require(
                fixed_id is not None,
                "packing.fixed_token",
                "must be one token of the tokenizer",
                config.fixed_token,
            )
        return cls(
            data_seed, config.fixed_position, fixed_id, config.random_positions, tokenizer.text_ids
        )

    def write(self, rows: RowArrays, epoch: int, row_B: np.ndarray) -> None:
        """Write into gathered rows ``row_B`` of an epoch, in place."""
        for position in self.random_positions:
            drawn_B = _draws(self.data_seed, epoch, row_B, position) % len(self.text_ids)
            self._write(rows, position, self.text_ids[drawn_B.astype(np.int64)])
        if self.fixed_position is not None:
            self._write(rows, self.fixed_position, self.fixed_id)

    def written(self, tokens_BW: np.ndarray, document_BW: np.ndarray) -> np.ndarray | None:
        """A copy of held-out prompts' tokens with all that is written; None where that is nothing,
        or lies beyond their end."""
        positions = [*self.random_positions]
        positions += [] if self.fixed_position is None else [self.fixed_position]
        if not positions or max(positions) >= tokens_BW.shape[1]:
            return None
        rows = RowArrays(tokens_BW.copy(), document_BW, *[np.zeros(0)] * 2)
        self.write(rows, HELD_OUT, np.arange(len(tokens_BW)))
        return rows.tokens_BW

    def _write(self, rows: RowArrays, position: int, ids: np.ndarray | int) -> None:
        is_token_B = rows.document_BW[:, position] >= 0
        column_B = rows.tokens_BW[:, position]
        column_B[:] = np.where(is_token_B, ids, column_B)


def _draws(data_seed: int, epoch: int, row_B: np.ndarray, position: int) -> np.ndarray:
    """uint64 [B]: a hash of all arguments, so that any row is drawn without those before it."""
    draw_B = row_B.astype(np.uint64)
    for number in (data_seed, epoch + 1, position):
        draw_B = _mix(draw_B ^ _mix(np.uint64([number])))
    return draw_B


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser; arithmetic is modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
