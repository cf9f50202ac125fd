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
from data.plan import Plan
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
    num_rows, context = rows.num_rows, config.context
    count_B = rows.segments_R
    first_B = rows.row_offsets_R1[:-1]
    row_S = np.repeat(np.arange(num_rows), count_B)
    length_S = rows.length_S.astype(np.int64)
    begin_S = length_S.cumsum() - length_S
    column_S = begin_S - np.repeat(begin_S[first_B] - config.pinned, count_B)
    number_S = np.arange(1, len(row_S) + 1) - np.repeat(first_B, count_B)

    # What follows a row is one more segment: one token in the last column. Only full rows have it.
    next_B = np.flatnonzero(rows.next_document_R >= 0)
    row_S = np.append(row_S, next_B)
    column_S = np.append(column_S, np.full(len(next_B), context))
    number_S = np.append(number_S, count_B[next_B] + ~rows.goes_on_R[next_B])
    length_S = np.append(length_S, np.ones(len(next_B), np.int64))
    document_S = np.append(rows.document_S, rows.next_document_R[next_B])
    offset_S = np.append(rows.offset_S, rows.next_offset_R[next_B]).astype(np.int64)

    start_S = row_S * (context + 1) + column_S
    cell_M = ranges(start_S, length_S)
    document_BW = np.full((num_rows, context + 1), -1, np.int32)
    document_BW.ravel()[cell_M] = np.repeat(number_S.astype(np.int32), length_S)
    begins_BW = np.zeros((num_rows, context + 1), bool)
    begins_BW.ravel()[cell_M] = np.repeat(offset_S == 0, length_S)

    tokens_BW = np.full((num_rows, context + 1), specials.pad, np.int64)
    text_start_S = documents.starts_N[document_S]
    has_bos = int(config.bos is BosKind.document)
    # A BOS is token 0 of its document, so the text begins one later; where BOS and EOS stand, a
    # neighbouring text token is read and overwritten.
    text_M = ranges(text_start_S + offset_S - has_bos, length_S)
    tokens_BW.ravel()[cell_M] = documents.tokens.take(text_M, mode="clip")
    if has_bos:
        tokens_BW.ravel()[start_S[offset_S == 0]] = specials.bos
    if config.eos:
        specials_per_document = config.specials_per_document
        end_S = documents.lengths_N[document_S] + specials_per_document
        ends_S = offset_S + length_S == end_S
        tokens_BW.ravel()[(start_S + length_S - 1)[ends_S]] = specials.eos
    if config.pinned:
        tokens_BW[:, 0] = specials.bos
        document_BW[:, 0] = 0

    if config.positions is PositionKind.row:
        positions_BT = np.tile(np.arange(context), (num_rows, 1))
    else:
        positions_BW = np.zeros((num_rows, context + 1), np.int64)
        positions_BW.ravel()[cell_M] = ranges(np.full_like(length_S, config.pinned), length_S)
        positions_BT = positions_BW[:, :-1]
    return RowArrays(tokens_BW, document_BW, begins_BW[:, :-1], positions_BT)


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
    """Labels and mask for gathered rows.

    A token is labelled with the one after it, in the row or following it, if there is one and (mask
    ``document``) it is of the same document; a pinned BOS is labelled with the row's first token.
    """
    document_BW = arrays.document_BW
    labelled_BT = document_BW[:, 1:] >= 0
    if config.mask is MaskKind.document:
        same_BT = document_BW[:, 1:] == document_BW[:, :-1]
        same_BT[:, : config.pinned] = True
        labelled_BT &= same_BT
    labels_BT = np.where(labelled_BT, arrays.tokens_BW[:, 1:], IGNORE_LABEL)
    document_BT = torch.from_numpy(np.ascontiguousarray(document_BW[:, :-1]))
    causal = config.mask is MaskKind.causal
    return PackedBatch(
        tokens_BT=torch.from_numpy(np.ascontiguousarray(arrays.tokens_BW[:, :-1])),
        labels_BT=torch.from_numpy(labels_BT),
        positions_BT=torch.from_numpy(np.ascontiguousarray(arrays.positions_BT)),
        document_BT=document_BT,
        begins_BT=torch.from_numpy(np.ascontiguousarray(arrays.begins_BT)),
        # Under a causal mask every token sees a BOS at position 0 anyway.
        mask=IntervalMask.from_documents(
            document_BT, pinned=0 if causal else config.pinned, causal_across=causal
        ),
        num_labels=torch.tensor(num_labels),
        cursor=cursor,
    )
