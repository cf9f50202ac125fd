"""What the data pipeline hands to a model: packed rows, their labels and their mask.

Axes: B rows, T positions of a row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE_LABEL
from kernels.masks import IntervalMask


class RowCursor(NamedTuple):
    """Where the stream of training rows stands: all of a run's data state.

    ``epoch`` and ``row`` name the next row; ``rows`` counts every row consumed so far, all ranks
    and epochs together.
    """

    epoch: int = 0
    row: int = 0
    rows: int = 0


@dataclass(kw_only=True)
class PackedBatch:
    """Rows of packed documents, one micro-batch of one rank.

    tokens_BT: int64 token ids.
    labels_BT: int64; the next token, or ``IGNORE_LABEL`` where no loss is taken.
    positions_BT: int64 positions for the position encoding.
    document_BT: int32; -1 padding, 0 a pinned BOS, documents of the row from 1.
    begins_BT: bool; the token's document begins in this row (it is not the rest of a cut one).
    mask: the keys each query sees.
    num_labels: int64 scalar; labelled tokens in the whole global batch, every micro-batch and rank:
        the denominator of the loss, so that accumulation and ranks change nothing.
    cursor: the stream's state after the global batch that these rows belong to.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    document_BT: Tensor
    begins_BT: Tensor
    mask: IntervalMask
    num_labels: Tensor
    cursor: RowCursor = field(default_factory=RowCursor)

    @classmethod
    def of_prompts(cls, tokens_BT: Tensor) -> PackedBatch:
        """Rows of one document each under a causal mask, without labels: int64, on the CPU."""
        batch_size, num_tokens = tokens_BT.shape
        return cls(
            tokens_BT=tokens_BT,
            labels_BT=torch.full_like(tokens_BT, IGNORE_LABEL),
            positions_BT=torch.arange(num_tokens).repeat(batch_size, 1),
            document_BT=torch.ones(batch_size, num_tokens, dtype=torch.int32),
            begins_BT=torch.ones(batch_size, num_tokens, dtype=torch.bool),
            mask=IntervalMask.causal(batch_size, num_tokens),
            num_labels=torch.tensor(0),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change) -> PackedBatch:
        moved = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | IntervalMask)
        }
        return dataclasses.replace(self, **moved)
