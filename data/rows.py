"""Rows of a plan as tensors: every step is an array operation over a whole batch.

Axes: B rows, T positions of a row, W = T + 1 (a row and the token after it), S segments of the rows
asked for, M their tokens, end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from data.documents import Documents, ranges
from data.packing import BosKind, MaskKind, PackingConfig, PositionKind
from data.plan import LabelRule, Plan
from data.tokenizers import TextTokenizer
from kernels.masks import IntervalMask
from models.batch import IGNORE_LABEL, PackedBatch, RowCursor

_START = RowCursor()


class SpecialIds(NamedTuple):
    """Token ids that packing adds; one that it doesn't use may be None.

    ``pad`` fills what nothing else does; padding is neither seen nor predicted.
    """

    bos: int | None
    eos: int | None
    pad: int = 0

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> SpecialIds:
        """A tokenizer's ids."""
        pad = tokenizer.pad_id
        return cls(tokenizer.bos_id, tokenizer.eos_id, 0 if pad is None else pad)


class RowArrays(NamedTuple):
    """Rows before labels and mask; rows of several epochs can be put together.

    ``tokens_BW`` (int64) and ``document_BW`` (int32) go one position beyond the row: what follows
    it, -1 in ``document_BW`` where nothing does.
    """

    tokens_BW: np.ndarray
    document_BW: np.ndarray
    begins_BT: np.ndarray
    positions_BT: np.ndarray


def gather_rows(
    documents: Documents, rows: Plan, config: PackingConfig, specials: SpecialIds
) -> RowArrays:
    """All rows of a plan over ``documents`` (``Plan.take`` makes one of the rows wanted)."""
    cells = _Cells(rows, config)
    next_B = np.flatnonzero(rows.next_document_R >= 0)

    number_S = np.arange(1, len(rows.length_S) + 1) - np.repeat(cells.first_B, rows.segments_R)
    document_BW = cells.spread(number_S.astype(np.int32), padding=-1)
    document_BW[next_B, -1] = rows.segments_R[next_B] + ~rows.goes_on_R[next_B]
    begins_BW = cells.spread(rows.offset_S == 0, padding=0)

    tokens = _Tokens(documents, config, specials)
    places_BW = cells.spread(tokens.places(rows.document_S, rows.offset_S) - cells.start_S)
    places_BW += cells.index_BW
    tokens_BW = tokens.text(places_BW)
    # A BOS or EOS is an end of its document, so of its segment.
    last_S = rows.length_S - 1
    tokens_BW.ravel()[cells.start_S] = tokens(rows.document_S, rows.offset_S)
    tokens_BW.ravel()[cells.start_S + last_S] = tokens(rows.document_S, rows.offset_S + last_S)
    tokens_BW.ravel()[cells.padding_M] = specials.pad
    tokens_BW[next_B, -1] = tokens(rows.next_document_R[next_B], rows.next_offset_R[next_B])

    if config.pinned:
        tokens_BW[:, 0] = specials.bos
        document_BW[:, 0] = 0
        begins_BW[:, 0] = False
    if config.positions is PositionKind.row:
        positions_BT = np.tile(np.arange(config.context), (rows.num_rows, 1))
    else:
        positions_BW = cells.index_BW - cells.spread(cells.start_S - config.pinned)
        positions_BW.ravel()[cells.padding_M] = 0
        positions_BW[:, : config.pinned] = 0
        positions_BT = positions_BW[:, :-1]
    return RowArrays(tokens_BW, document_BW, begins_BW[:, :-1], positions_BT)


class _Cells:
    """Where segments lie in [B, W] cells.

    If a row's first segment began with the row and its last one ended with it, the segments' cells
    would be all cells in their order: an array over cells is one over segments, repeated, which is
    far cheaper than indexing each cell. Padding, a pinned BOS and what follows a row (one more
    token, in the last column) are written over that.

    first_B: the first segment of each row; start_S: the first cell of each segment.
    padding_M: cells after the tokens of a row, the last column included; index_BW: all cells.
    """

    def __init__(self, rows: Plan, config: PackingConfig):
        width = config.context + 1
        self.shape = (rows.num_rows, width)
        self.index_BW = np.arange(rows.num_rows * width).reshape(self.shape)
        self.first_B = rows.row_offsets_R1[:-1]
        used_B = config.pinned + rows.tokens_R
        self.padding_M = ranges(self.index_BW[:, 0] + used_B, width - used_B)
        self._cells_S = rows.length_S.astype(np.int64)
        self._cells_S[self.first_B] += config.pinned
        self._cells_S[rows.row_offsets_R1[1:] - 1] += width - used_B
        self.start_S = self._cells_S.cumsum() - self._cells_S
        self.start_S[self.first_B] += config.pinned

    def spread(self, value_S: np.ndarray, padding: int | None = None) -> np.ndarray:
        """[B, W]: the value of the segment in each cell, ``padding`` after the tokens of a row."""
        value_BW = np.repeat(value_S, self._cells_S).reshape(self.shape)
        if padding is not None:
            value_BW.ravel()[self.padding_M] = padding
        return value_BW


class _Tokens:
    """Tokens of documents, BOS and EOS counted."""

    def __init__(self, documents: Documents, config: PackingConfig, specials: SpecialIds):
        self._documents = documents
        self._specials = specials
        self._has_bos = int(config.bos is BosKind.document)
        self._has_eos = config.eos

    def __call__(self, document_S: np.ndarray, offset_S: np.ndarray) -> np.ndarray:
        """int64: token ``offset_S`` of each document."""
        tokens_S = self.text(self.places(document_S, offset_S))
        if self._has_bos:
            tokens_S[offset_S == 0] = self._specials.bos
        if self._has_eos:
            end_S = self._documents.lengths_N[document_S] + self._has_bos
            tokens_S[offset_S == end_S] = self._specials.eos
        return tokens_S

    def places(self, document_S: np.ndarray, offset_S: np.ndarray) -> np.ndarray:
        """int64: where in the text a document's token is; where a neighbour is for BOS and EOS."""
        return self._documents.starts_N[document_S] + offset_S - self._has_bos

    def text(self, place: np.ndarray) -> np.ndarray:
        """int64: tokens of the text; any will do for a place beyond its ends."""
        return self._documents.tokens.take(place, mode="clip").astype(np.int64)


def concatenate(parts: list[RowArrays]) -> RowArrays:
    """The rows of several parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    return RowArrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def finish_rows(
    arrays: RowArrays,
    config: PackingConfig,
    *,
    num_labels: int,
    cursor: RowCursor = _START,
) -> PackedBatch:
    """Labels (see ``LabelRule``) and mask for gathered rows."""
    document_BT = torch.from_numpy(np.ascontiguousarray(arrays.document_BW[:, :-1]))
    causal = config.mask is MaskKind.causal
    # Under a causal mask every token sees a BOS at position 0 anyway.
    mask = IntervalMask.from_documents(
        document_BT, pinned=0 if causal else config.pinned, causal_across=causal
    )
    labelled_BT = _labelled(arrays, config.labels, mask.document_start_BT.numpy())
    labels_BT = np.where(labelled_BT, arrays.tokens_BW[:, 1:], IGNORE_LABEL)
    if config.prefix:
        mask = mask.prefix(config.prefix, of_row=causal)
    return PackedBatch(
        tokens_BT=torch.from_numpy(np.ascontiguousarray(arrays.tokens_BW[:, :-1])),
        labels_BT=torch.from_numpy(labels_BT),
        positions_BT=torch.from_numpy(np.ascontiguousarray(arrays.positions_BT)),
        document_BT=document_BT,
        begins_BT=torch.from_numpy(np.ascontiguousarray(arrays.begins_BT)),
        mask=mask,
        num_labels=torch.tensor(num_labels),
        cursor=cursor,
    )


def _labelled(arrays: RowArrays, rule: LabelRule, start_BT: np.ndarray) -> np.ndarray:
    """bool [B, T]: the positions that take a loss; ``start_BT``: where their piece begins."""
    document_BW = arrays.document_BW
    labelled_BT = document_BW[:, 1:] >= 0
    if not rule.causal:
        same_BT = document_BW[:, 1:] == document_BW[:, :-1]
        same_BT[:, : rule.pinned] = True
        labelled_BT &= same_BT
    labelled_BT[:, : rule.first] = False
    if not rule.at_pinned:
        labelled_BT[:, : rule.pinned] = False
    if rule.first_of_piece or not rule.at_begin:
        offset_BT = np.arange(start_BT.shape[1]) - start_BT
        left_out_BT = offset_BT < rule.first_of_piece
        if not rule.at_begin:
            left_out_BT |= arrays.begins_BT & (offset_BT == 0)
        # A pinned BOS is no document's.
        left_out_BT[:, : rule.pinned] = False
        labelled_BT &= ~left_out_BT
    return labelled_BT
