"""Documents, as text on their way into a store and as tokens on their way out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np

_ORDER_OF_CHANCE = 2410_10781
"""Seed of ``in_order_of_chance``; any number would do."""


class Split(StrEnum):
    """The side of the validation split a document is on."""

    train = "train"
    validation = "validation"


class TextDocument(NamedTuple):
    """A document's text and its side of the split."""

    split: Split
    text: str


@dataclass(frozen=True)
class Documents:
    """Documents as stretches of one array of text tokens (no BOS, no EOS).

    Axes: N documents. Document n is the ``lengths_N[n]`` tokens from ``tokens[starts_N[n]]`` on.
    ``tokens`` is of any integer dtype and may be a memory map; the others are int64.
    """

    tokens: np.ndarray
    starts_N: np.ndarray
    lengths_N: np.ndarray

    @classmethod
    def end_to_end(cls, tokens: np.ndarray, offsets_N1: np.ndarray) -> Documents:
        """Document n is ``tokens[offsets_N1[n] : offsets_N1[n + 1]]``."""
        offsets_N1 = np.asarray(offsets_N1, np.int64)
        return cls(tokens, offsets_N1[:-1], np.diff(offsets_N1))

    def __len__(self) -> int:
        return len(self.starts_N)

    def in_order_of_chance(self) -> Documents:
        """The same documents in an order that depends on their number alone. No token is copied."""
        order_N = np.random.default_rng(_ORDER_OF_CHANCE).permutation(len(self))
        return Documents(self.tokens, self.starts_N[order_N], self.lengths_N[order_N])

    def of_unique_tokens(self, num_tokens: int) -> Documents:
        """Documents of exactly ``num_tokens`` text tokens, the last one cropped to fit.

        They come in an order of chance, so that fewer tokens are a part of more.
        """
        mixed = self.in_order_of_chance()
        ends_N = mixed.lengths_N.cumsum()
        count = int(np.searchsorted(ends_N, num_tokens)) + 1
        lengths_N = mixed.lengths_N[:count].copy()
        lengths_N[-1] -= ends_N[count - 1] - num_tokens
        return Documents(self.tokens, mixed.starts_N[:count], lengths_N)


class DocumentSource(Protocol):
    """Where the documents of each epoch come from."""

    repeats: bool
    """Whether every epoch has the same documents."""

    def epoch(self, epoch: int) -> Documents:
        """The documents of an epoch, the same at every call and in every process."""
        ...


class FixedDocuments:
    """A source that has the same documents in every epoch."""

    repeats = True

    def __init__(self, documents: Documents):
        self.documents = documents

    def epoch(self, epoch: int) -> Documents:
        """All documents, whatever the epoch."""
        return self.documents


def ranges(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of each range, end to end; int64."""
    ends_N = np.cumsum(lengths_N)
    shift_N = np.asarray(starts_N, np.int64) - (ends_N - lengths_N)
    return np.repeat(shift_N, lengths_N) + np.arange(ends_N[-1] if len(ends_N) else 0)
