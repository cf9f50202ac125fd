"""The shipped corpus: Jane Austen's six novels, 4 MB of public-domain English."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from data.corpora.base import TextCorpus, TextCorpusConfig
from data.corpora.reading import read_file
from data.cutting import Cut, Entry
from data.files import file_sha256

_PATH = Path(__file__).parent.parent / "austen" / "chapters.jsonl.xz"


class AustenUnit(StrEnum):
    """What one document is."""

    chapters = "chapters"
    paragraphs = "paragraphs"


@dataclass(kw_only=True)
class AustenConfig(TextCorpusConfig):
    """Settings of the shipped corpus."""

    unit: AustenUnit = AustenUnit.chapters
    """A document is a chapter (269, of some 5,000 tokens) or a paragraph (10,009, short)."""


class AustenCorpus(TextCorpus):
    """Source entries are chapters whatever the unit, so a chapter's paragraphs stay together."""

    Config = AustenConfig
    config: AustenConfig

    @cached_property
    def source(self) -> dict:
        return {"kind": "austen", "sha256": file_sha256(_PATH)}

    @property
    def cutting(self) -> dict:
        return {"unit": self.config.unit.value}

    def entries(self) -> Iterator[Entry]:
        cut = Cut.whole if self.config.unit is AustenUnit.chapters else Cut.blank_line
        texts = read_file(
            _PATH, "text", self.cache_dir, rule="corpus=austen must find its file intact"
        )
        return (Entry(text, cut) for text in texts)
