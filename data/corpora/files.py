"""The user's own files: jsonl, parquet or plain text, by glob, and installed packages' sources."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.corpora.base import TextCorpus, TextCorpusConfig
from data.corpora.packages import PackageSources
from data.corpora.reading import expand_globs, read_file, text_bytes
from data.cutting import Cut, Entry
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

    cut: Cut = Cut.whole
    """How the files' entries become documents: whole, at blank_line or at two_blank_lines."""

    packages: list[str] = field(default_factory=list)
    """Installed Python packages whose sources are read too, after the files: name, or name==version
    to insist on one. An entry a file, cut at two blank lines."""

    def __post_init__(self):
        super().__post_init__()
        require(
            len(self.paths) + len(self.packages) > 0,
            "corpus.paths",
            "must name at least one file (or corpus.packages a package)",
            self.paths,
        )


class FilesCorpus(TextCorpus):
    """Files in the order of their paths, then packages; of a file, only its contents enter the
    cache's key."""

    Config = FilesConfig
    config: FilesConfig

    @cached_property
    def files(self) -> list[Path]:
        """The files that ``paths`` matches."""
        return expand_globs(self.config.paths, "corpus.paths")

    @cached_property
    def packages(self) -> list[PackageSources]:
        """The packages that ``packages`` names."""
        return [PackageSources(wanted) for wanted in sorted(self.config.packages)]

    @cached_property
    def source(self) -> dict:
        return {
            "kind": "files",
            "files": [[path.name, file_sha256(path)] for path in self.files],
            "text_field": self.config.text_field,
            "packages": [package.source for package in self.packages],
        }

    @property
    def cutting(self) -> dict:
        return {"cut": self.config.cut.value}

    def entries(self) -> Iterator[Entry]:
        for path in self.files:
            texts = read_file(
                path,
                self.config.text_field,
                self.cache_dir,
                rule="corpus.paths must match readable files",
            )
            for text in texts:
                yield Entry(text, self.config.cut)
        for package in self.packages:
            yield from package.entries()

    def num_bytes(self) -> int | None:
        of_files = text_bytes(self.files) if self.files else 0
        of_packages = sum(package.num_bytes for package in self.packages)
        return None if of_files is None else of_files + of_packages
