"""A progress bar over bytes of text, for what may take minutes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm


class Progress:
    """Bytes done, MB/s and, if the total is known, the time left, on stderr.

    What is over within seconds shows nothing; a log file gets a line every half minute.
    """

    def __init__(self, what: str, total_bytes: int | None):
        self._bar = tqdm(
            desc=what,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            delay=3,
            mininterval=0.2 if sys.stderr.isatty() else 30,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, num_bytes: int) -> None:
        """Count bytes that were just worked through."""
        self._bar.update(num_bytes)

    def skip(self, num_bytes: int) -> None:
        """Count bytes that were done before: they are no part of the speed."""
        self._bar.initial += num_bytes
        self._bar.update(num_bytes)


def watched(texts: Iterable[str], what: str, total_bytes: int | None) -> Iterator[str]:
    """The same texts, with a bar that counts them as they are taken."""
    with Progress(what, total_bytes) as progress:
        for text in texts:
            yield text
            # Near enough for a bar, and free: most text is a byte a character.
            progress.add(len(text))
