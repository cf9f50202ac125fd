"""Documents, as text on their way into a store and as tokens on their way out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np


class Split(StrEnum):
    """The side of the validation split a document is on."""

    train = "train"
    validation = "validation"


class TextDocument(NamedTuple):
    """A document's text, its side of the split, and a key of the source entry it was cut from."""

    split: Split
    entry: str
    text: str


@dataclass(frozen=True)
class Documents:
    """Documents end to end, text tokens only (no BOS, no EOS).

    Axes: N documents. Document n is ``tokens[offsets_N1[n] : offsets_N1[n + 1]]``.
    ``tokens`` is of any integer dtype and may be a memory map; ``offsets_N1`` is int64.
    """

    tokens: np.ndarray
    offsets_N1: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def lengths_N(self) -> np.ndarray:
        """int64: text tokens of each document."""
        return np.diff(self.offsets_N1)


class DocumentSource(Protocol):
    """Where the documents of each epoch come from."""

    def epoch(self, epoch: int) -> Documents:
        """The documents of an epoch, the same at every call and in every process."""
        ...


class FixedDocuments:
    """A source that has the same documents in every epoch."""

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
