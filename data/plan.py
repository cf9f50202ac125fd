"""A plan of packed rows: which piece of which document lies where, and what follows each row.

Lengths and offsets count a document's tokens with its BOS and EOS. Everything here is vectorised:
a plan of millions of rows takes seconds, and any of its rows is found in O(1).

Axes: N documents, S segments, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.documents import ranges


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """Which positions of a row take a loss.

    A token is labelled with the one after it, in the row or following it, if there is one and
    (unless ``causal``) it is of the same document; a pinned BOS with the row's first token. Without
    a label are positions of the row before ``first``, of a document's piece before
    ``first_of_piece``, the pinned BOS unless ``at_pinned``, and the token that a document begins
    with unless ``at_begin``.
    """

    causal: bool
    pinned: int = 0
    first: int = 0
    first_of_piece: int = 0
    at_pinned: bool = True
    at_begin: bool = True


@dataclass(frozen=True)
class Plan:
    """Rows as segments of documents.

    Row r has the segments ``row_offsets_R1[r] : row_offsets_R1[r + 1]``; segment s is the tokens
    ``offset_S[s] : offset_S[s] + length_S[s]`` of ``document_S[s]``. After a row comes token
    ``next_offset_R`` of ``next_document_R``, the label of its last position; -1: nothing does.
    Segments and ``next_*`` are int32, ``row_offsets_R1`` int64.
    """

    document_S: np.ndarray
    offset_S: np.ndarray
    length_S: np.ndarray
    row_offsets_R1: np.ndarray
    next_document_R: np.ndarray
    next_offset_R: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the plan."""
        return len(self.row_offsets_R1) - 1

    @property
    def segments_R(self) -> np.ndarray:
        """int64: segments of each row."""
        return np.diff(self.row_offsets_R1)

    @property
    def tokens_R(self) -> np.ndarray:
        """int64: stream tokens of each row (neither a pinned BOS nor padding)."""
        return np.add.reduceat(self.length_S, self.row_offsets_R1[:-1], dtype=np.int64)

    def text_tokens_R(self, text_lengths_N: np.ndarray, *, bos: bool, eos: bool) -> np.ndarray:
        """int64: tokens of each row that are text, where documents have a BOS or an EOS."""
        end_S = self.offset_S.astype(np.int64) + self.length_S
        specials_S = bos * (self.offset_S == 0).astype(np.int64)
        specials_S += eos * (end_S == text_lengths_N[self.document_S] + bos + eos)
        return np.add.reduceat(self.length_S - specials_S, self.row_offsets_R1[:-1])

    @property
    def goes_on_R(self) -> np.ndarray:
        """bool: what follows the row is the next token of the row's last document."""
        last_R = self.row_offsets_R1[1:] - 1
        same_R = self.document_S[last_R] == self.next_document_R
        return same_R & (self.offset_S[last_R] + self.length_S[last_R] == self.next_offset_R)

    def labels_R(self, rule: LabelRule) -> np.ndarray:
        """int64: labelled positions of each row.

        A segment of n tokens has n - 1 labels inside, and one at its end if what follows may be
        predicted; those that the rule leaves out are its first ones.
        """
        labels_S = self.length_S.astype(np.int64)
        last_R = self.row_offsets_R1[1:] - 1
        if rule.causal:
            labels_S[last_R] -= self.next_document_R < 0
        else:
            labels_S -= 1
            labels_S[last_R] += self.goes_on_R
        # Where each segment lies in its row.
        start_S = self.length_S.cumsum(dtype=np.int64) - self.length_S
        start_S += np.repeat(rule.pinned - start_S[self.row_offsets_R1[:-1]], self.segments_R)
        without_S = np.maximum(rule.first - start_S, rule.first_of_piece)
        if not rule.at_begin:
            without_S = np.maximum(without_S, self.offset_S == 0)
        labels_S -= np.clip(without_S, 0, labels_S)
        at_pinned = rule.pinned * (rule.at_pinned and rule.first == 0)
        return np.add.reduceat(labels_S, self.row_offsets_R1[:-1]) + at_pinned

    def with_documents(self, document_N: np.ndarray) -> Plan:
        """The same plan with document n renamed to ``document_N[n]``."""
        document_N = document_N.astype(np.int32)
        exists_R = self.next_document_R >= 0
        return replace(
            self,
            document_S=document_N[self.document_S],
            next_document_R=np.where(exists_R, document_N[self.next_document_R], -1),
        )

    def take(self, row_R: np.ndarray) -> Plan:
        """The plan of these rows, in this order."""
        segments_R = self.segments_R[row_R]
        segment_S = ranges(self.row_offsets_R1[row_R], segments_R)
        return Plan(
            document_S=self.document_S[segment_S],
            offset_S=self.offset_S[segment_S],
            length_S=self.length_S[segment_S],
            row_offsets_R1=_offsets(segments_R),
            next_document_R=self.next_document_R[row_R],
            next_offset_R=self.next_offset_R[row_R],
        )


def pack_chunk(length_N: np.ndarray, capacity: int) -> Plan:
    """Concatenate the documents and cut every ``capacity`` tokens.

    What follows a row is the first token of the next one, whatever document it is of.
    """
    end_N = length_N.cumsum()
    start_N = end_N - length_N
    num_tokens = int(end_N[-1])
    row_start_R = np.arange(0, num_tokens, capacity)
    # A segment begins wherever a document or a row does.
    start_S = np.union1d(start_N, row_start_R)
    document_S = np.searchsorted(end_N, start_S, side="right")
    offset_S = start_S - start_N[document_S]
    length_S = np.diff(start_S, append=num_tokens)
    first_R = np.searchsorted(start_S, row_start_R)
    return Plan(
        document_S=document_S.astype(np.int32),
        offset_S=offset_S.astype(np.int32),
        length_S=length_S.astype(np.int32),
        row_offsets_R1=np.append(first_R, len(start_S)),
        next_document_R=np.append(document_S[first_R[1:]], -1).astype(np.int32),
        next_offset_R=np.append(offset_S[first_R[1:]], -1).astype(np.int32),
    )


def pack_single(length_N: np.ndarray, capacity: int) -> Plan:
    """One document a row; what is longer than ``capacity`` is dropped."""
    num_documents = len(length_N)
    return plan_of_pieces(
        document_S=np.arange(num_documents),
        offset_S=np.zeros(num_documents, np.int32),
        length_S=np.minimum(length_N, capacity),
        segments_R=np.ones(num_documents, np.int64),
        length_N=length_N,
    )


def plan_of_pieces(
    *,
    document_S: np.ndarray,
    offset_S: np.ndarray,
    length_S: np.ndarray,
    segments_R: np.ndarray,
    length_N: np.ndarray,
) -> Plan:
    """A plan whose rows don't follow one another.

    What follows a row is the rest of its last document; nothing does if that ends with the row.
    """
    row_offsets_R1 = _offsets(segments_R)
    last_R = row_offsets_R1[1:] - 1
    document_R, end_R = document_S[last_R], offset_S[last_R] + length_S[last_R]
    goes_on_R = end_R < length_N[document_R]
    return Plan(
        document_S=document_S.astype(np.int32),
        offset_S=offset_S.astype(np.int32),
        length_S=length_S.astype(np.int32),
        row_offsets_R1=row_offsets_R1,
        next_document_R=np.where(goes_on_R, document_R, -1).astype(np.int32),
        next_offset_R=np.where(goes_on_R, end_R, -1).astype(np.int32),
    )


def _offsets(count_R: np.ndarray) -> np.ndarray:
    offsets_R1 = np.zeros(len(count_R) + 1, np.int64)
    np.cumsum(count_R, out=offsets_R1[1:])
    return offsets_R1
