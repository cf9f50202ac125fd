"""Cutting source entries into documents."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

_BLANK_LINE = re.compile(r"\n(?:[ \t\r]*\n)+")
_TWO_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n){2,}")


class Cut(StrEnum):
    """Where an entry is cut."""

    whole = "whole"
    blank_line = "blank_line"
    two_blank_lines = "two_blank_lines"


class Entry(NamedTuple):
    """The text of a source entry, and how it is cut."""

    text: str
    cut: Cut = Cut.whole


def documents_of(entry: Entry) -> Iterable[str]:
    """The documents of an entry, in order.

    Paragraphs, cut at blank lines, lose the white space around them; pieces cut at two blank lines,
    where Python sources part their definitions, keep their indentation. Empty ones are left out.
    """
    if entry.cut is Cut.whole:
        return (entry.text,)
    if entry.cut is Cut.blank_line:
        return filter(None, map(str.strip, _BLANK_LINE.split(entry.text)))
    pieces = (piece.strip("\r\n") for piece in _TWO_BLANK_LINES.split(entry.text))
    return (piece for piece in pieces if piece.strip())
