"""A data set of the Hugging Face hub, or a local folder laid out like one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from data.corpora.base import TextCorpus, TextCorpusConfig
from data.corpora.reading import read_dataset, text_bytes
from data.cutting import Entry
from data.files import file_sha256
from kernels.errors import require


@dataclass(kw_only=True)
class HubConfig(TextCorpusConfig):
    """Settings of a hub data set."""

    name: str = ""
    """The data set's name on the hub (owner/name), or a local folder."""

    subset: str | None = None
    """Its configuration; null = its only or default one."""

    split: str = "train"
    """The data set's own split to read; the validation text is split from it."""

    text_field: str = "text"
    """The field of a row that holds the text."""

    revision: str | None = None
    """Branch, tag or commit; with null the cache doesn't notice when the hub's copy changes."""

    streaming: bool = True
    """Read over the network as it goes, without a copy of the data set on the disk."""

    max_documents: int | None = None
    """Rows read, from the first; null = all."""

    def __post_init__(self):
        super().__post_init__()
        require(self.name != "", "corpus.name", "must name a data set", self.name)
        require(
            self.max_documents is None or self.max_documents >= 2,
            "corpus.max_documents",
            "must be >= 2 or null",
            self.max_documents,
        )


class HubCorpus(TextCorpus):
    """Rows in the data set's own order."""

    Config = HubConfig
    config: HubConfig

    @cached_property
    def source(self) -> dict:
        config = self.config
        source = {
            "kind": "hub",
            "name": config.name,
            "subset": config.subset,
            "split": config.split,
            "revision": config.revision,
            "text_field": config.text_field,
            "max_documents": config.max_documents,
        }
        folder = Path(config.name)
        if folder.is_dir():
            source["name"] = folder.name
            source["files"] = [
                [str(path.relative_to(folder)), file_sha256(path)] for path in self._local_files
            ]
        return source

    def entries(self) -> Iterator[Entry]:
        config = self.config
        texts = read_dataset(
            config.name,
            subset=config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
            text_field=config.text_field,
            cache_dir=self.cache_dir,
        )
        return map(Entry, islice(texts, config.max_documents))

    def num_bytes(self) -> int | None:
        if self.config.max_documents is not None:
            return None
        return text_bytes(self._local_files)

    @cached_property
    def _local_files(self) -> list[Path]:
        folder = Path(self.config.name)
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.rglob("*") if path.is_file())
