"""Best-fit packing: whole documents together in full rows, few of them cut.

Documents longer than a row are first cut into pieces that fill a row each, and a rest. Rests and
short documents wait in a buffer of bounded size; a row takes the largest that fits, again and
again. Left at that, the last gap of a row is mostly shorter than every document in the buffer, and
something must be cut: nearly one document a row, no better than ``chunk``. So before the largest, a
row looks for one, two or three pieces in the buffer that fill it exactly. Only where there are none
and nothing fits is a piece cropped, the shortest that is longer than the gap (it loses the least);
its rest is dropped. Every row is full but the last of the epoch, which is padded.

On mostly short documents (median 83 tokens, mean 218) and rows of 2,048 that cuts a quarter of the
documents that ``chunk`` cuts, most of them longer than a row, and drops 0.1 % of the tokens.

Cost: a bit for each length with a piece waiting, in one big integer, finds the largest that fits
and all exact pairs in a few operations; about a million documents in three seconds.
"""

from __future__ import annotations

import numpy as np

from data.plan import Plan, plan_of_pieces

BUFFER_PIECES = 4096
"""Pieces that wait for a row: more of them fill more rows exactly."""

TRIPLE_TRIES = 8
"""Largest pieces tried as the first of three that fill a gap exactly."""


def pack_best_fit(length_N: np.ndarray, capacity: int) -> Plan:
    """Plan rows of ``capacity`` stream tokens from documents of these lengths (all >= 1)."""
    full_N, rest_N = np.divmod(length_N, capacity)
    document_F = np.repeat(np.arange(len(length_N)), full_N)
    piece_F = np.arange(len(document_F)) - np.repeat(full_N.cumsum() - full_N, full_N)
    document_P = np.flatnonzero(rest_N)
    piece_S, length_S, segments_R = _fill_rows(rest_N[document_P].tolist(), capacity)
    document_S = document_P[piece_S]
    return plan_of_pieces(
        document_S=np.concatenate([document_F, document_S]),
        offset_S=np.concatenate([piece_F, full_N[document_S]]) * capacity,
        length_S=np.concatenate([np.full(len(document_F), capacity), length_S]),
        segments_R=np.concatenate([np.ones(len(document_F), np.int64), segments_R]),
        length_N=length_N,
    )


def _fill_rows(lengths: list[int], capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay pieces shorter than ``capacity`` into rows.

    Returns the piece and the length of each segment (shorter than the piece if it was cropped),
    and the number of segments of each row.
    """
    buffer = _Buffer(capacity)
    pieces: list[int] = []
    crops: list[tuple[int, int]] = []
    row_ends: list[int] = []
    added = 0
    while True:
        while buffer.count < BUFFER_PIECES and added < len(lengths):
            buffer.add(lengths[added], added)
            added += 1
        if not buffer.count:
            break
        gap = capacity
        while gap and buffer.count:
            fit = buffer.exact(gap)
            if fit:
                pieces += [buffer.pop(length) for length in fit]
                gap = 0
            elif length := buffer.largest(gap):
                pieces.append(buffer.pop(length))
                gap -= length
            else:
                crops.append((len(pieces), gap))
                pieces.append(buffer.pop(buffer.shortest_above(gap)))
                gap = 0
        row_ends.append(len(pieces))
    piece_S = np.array(pieces, np.int64)
    length_S = np.array(lengths, np.int64)[piece_S]
    if crops:
        cropped, gaps = zip(*crops, strict=True)
        length_S[list(cropped)] = gaps
    return piece_S, length_S, np.diff(np.array(row_ends, np.int64), prepend=0)


class _Buffer:
    """Pieces by length, with one bit a length that is there.

    ``here`` has bit n set if a piece of n tokens waits, ``mirrored`` bit capacity - n: shifted by
    capacity - gap, the mirror has bit n set if a piece of gap - n waits.
    """

    def __init__(self, capacity: int):
        self.count = 0
        self._capacity = capacity
        self._here = 0
        self._mirrored = 0
        self._pieces: list[list[int]] = [[] for _ in range(capacity + 1)]

    def add(self, length: int, piece: int) -> None:
        pieces = self._pieces[length]
        if not pieces:
            self._here |= 1 << length
            self._mirrored |= 1 << (self._capacity - length)
        pieces.append(piece)
        self.count += 1

    def pop(self, length: int) -> int:
        pieces = self._pieces[length]
        piece = pieces.pop()
        if not pieces:
            self._here ^= 1 << length
            self._mirrored ^= 1 << (self._capacity - length)
        self.count -= 1
        return piece

    def largest(self, gap: int) -> int:
        """The largest length that fits, 0 if none does."""
        return max(0, (self._here & ((1 << (gap + 1)) - 1)).bit_length() - 1)

    def shortest_above(self, gap: int) -> int:
        """The shortest length above ``gap``."""
        above = self._here >> (gap + 1)
        return gap + (above & -above).bit_length()

    def exact(self, gap: int) -> tuple[int, ...]:
        """Lengths of one, two or three pieces that fill the gap, or ()."""
        if self._pieces[gap]:
            return (gap,)
        here = self._here
        longest = here.bit_length() - 1
        if gap > 3 * longest:
            return ()
        mirrored = self._mirrored >> (self._capacity - gap)
        both = here & mirrored
        if both:
            larger = both.bit_length() - 1
            if 2 * larger != gap or len(self._pieces[larger]) > 1:
                return (larger, gap - larger)
        untried = here & ((1 << gap) - 1)
        for _ in range(TRIPLE_TRIES):
            if not untried:
                break
            first = untried.bit_length() - 1
            both = here & (mirrored >> first)
            if both:
                second = both.bit_length() - 1
                triple = (first, second, gap - first - second)
                if all(len(self._pieces[length]) >= triple.count(length) for length in triple):
                    return triple
            untried ^= 1 << first
        return ()
