"""The user's own files: jsonl, parquet or plain text, by glob."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.corpora.base import TextCorpus, TextCorpusConfig
from data.corpora.reading import expand_globs, read_file
from data.files import file_sha256
from kernels.errors import require


@dataclass(kw_only=True)
class FilesConfig(TextCorpusConfig):
    """Settings of a corpus of files."""

    paths: list[str] = field(default_factory=list)
    """Globs of .jsonl, .json and .parquet files, an entry a row, and of text files with any other
    suffix, an entry a file; each may end in .xz, .gz, .bz2 or .zst."""

    text_field: str = "text"
    """The field of a row that holds the text; plain text files have none."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.paths) > 0, "corpus.paths", "must name at least one file", self.paths)


class FilesCorpus(TextCorpus):
    """Files in the order of their paths; only their contents enter the cache's key."""

    Config = FilesConfig
    config: FilesConfig

    @cached_property
    def files(self) -> list[Path]:
        """The files that ``paths`` matches."""
        return expand_globs(self.config.paths, "corpus.paths")

    @cached_property
    def source(self) -> dict:
        return {
            "kind": "files",
            "files": [[path.name, file_sha256(path)] for path in self.files],
            "text_field": self.config.text_field,
        }

    def entries(self) -> Iterator[str]:
        for path in self.files:
            yield from read_file(
                path,
                self.config.text_field,
                self.cache_dir,
                rule="corpus.paths must match readable files",
            )
