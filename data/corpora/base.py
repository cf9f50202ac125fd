"""What every text corpus is: source entries, a split of them, and documents cut from them.

The split is made by source entry, before any cutting, and by a hash of the entry's text alone: it
is the same for every packing, seed and way of cutting, and copies of one text are never on both
sides. The tokenizer is trained on whole training entries, so it doesn't depend on the cutting
either.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from data.backcopy import BackcopyProcess
from data.cutting import Entry, documents_of
from data.documents import DocumentSource, FixedDocuments, Split, TextDocument
from data.files import json_sha256
from data.store import StoreDtype, TokenStore, open_store
from data.tokenizers import BpeConfig, TextTokenizer, TokenizerConfig, build_tokenizer
from kernels.errors import UserError, require

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextCorpusConfig:
    """Settings of every corpus that is read rather than generated."""

    validation_fraction: float = 0.05
    """Share of the source entries held out, chosen by a hash of their text."""

    min_document_tokens: int = 1
    """Documents of fewer text tokens are dropped and counted; 1 drops only empty ones."""

    near_duplicate_tokens: int = 64
    """Held-out documents that share this many tokens in a row with training text are left out; 0
    keeps them."""

    store_dtype: StoreDtype = StoreDtype.auto
    """Integer type of a stored token; auto takes the smallest that holds the vocabulary."""

    unique_tokens: int | None = None
    """Train on documents of exactly this many text tokens, over and over; null = on all. Neither
    the validation text nor the tokenizer depends on it."""

    def __post_init__(self):
        require(
            self.unique_tokens is None or self.unique_tokens >= 1,
            "corpus.unique_tokens",
            "must be >= 1 or null",
            self.unique_tokens,
        )
        require(
            0 < self.validation_fraction < 1,
            "corpus.validation_fraction",
            "must be above 0 and below 1",
            self.validation_fraction,
        )
        require(
            self.near_duplicate_tokens >= 0,
            "corpus.near_duplicate_tokens",
            "must be >= 0",
            self.near_duplicate_tokens,
        )
        require(
            self.min_document_tokens >= 1,
            "corpus.min_document_tokens",
            "must be >= 1",
            self.min_document_tokens,
        )


class OpenCorpus(NamedTuple):
    """A corpus ready for packing.

    ``sha256`` is what a result cites: it names the tokens, the split and the tokenizer. ``process``
    is set if documents come from a known random process, whose optimal loss can be computed.
    """

    train: DocumentSource
    validation: DocumentSource
    tokenizer: TextTokenizer
    store: TokenStore
    sha256: str
    process: BackcopyProcess | None = None

    def describe(self) -> list[str]:
        """Lines of text about the store, and what of it is trained on if that isn't all."""
        lines = self.store.describe()
        documents = self.train.epoch(0)
        num_tokens = int(documents.lengths_N.sum())
        if self.train.repeats and num_tokens < len(self.store.train.tokens):
            lines.append(f"trained on: {len(documents):,} documents of {num_tokens:,} tokens")
        return lines


class TextCorpus(ABC):
    """A corpus of text, read entry by entry in bounded memory."""

    Config: ClassVar[type[TextCorpusConfig]]

    def __init__(self, config: TextCorpusConfig, cache_dir: Path):
        self.config = config
        self.cache_dir = cache_dir

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The entries of the source, whole, in their order.

        Raises ``UserError`` if the source can't be read.
        """

    @cached_property
    @abstractmethod
    def source(self) -> dict:
        """What the entries depend on, as JSON: the cache's key."""

    @property
    def cutting(self) -> dict:
        """What the entries' cuts depend on, as JSON."""
        return {}

    def num_bytes(self) -> int | None:
        """How much text there is, about, to tell the time left; None if nobody knows."""
        return None

    def documents(self) -> Iterator[TextDocument]:
        """Every document of both sides of the split."""
        for split, entry in self._split_entries():
            for document in documents_of(entry):
                yield TextDocument(split, document)

    def training_texts(self) -> Iterator[str]:
        """The training entries, whole: what a tokenizer is trained on."""
        for split, entry in self._split_entries():
            if split is Split.train:
                yield entry.text

    @property
    def training_texts_key(self) -> dict:
        """What ``training_texts`` depends on, as JSON."""
        return {"source": self.source, "validation_fraction": self.config.validation_fraction}

    def open(self, tokenizer_config: TokenizerConfig, processes: int | None = None) -> OpenCorpus:
        """Tokenizer and token store, built if the cache has none, by ``processes`` (None: one a
        core).

        Raises ``UserError`` for a source, tokenizer or store that can't be used.
        """
        if isinstance(tokenizer_config, BpeConfig):
            # Known before it is trained, which may yield fewer tokens.
            self.config.store_dtype.resolve(tokenizer_config.vocab_size)
        try:
            tokenizer = build_tokenizer(tokenizer_config, self, self.cache_dir)
            store = self.tokenise(tokenizer, self.cache_dir, processes)
        except OSError as error:
            raise UserError(
                "cache_dir must be writable and have room (what was done is kept), got "
                f"{self.cache_dir}: {error}"
            ) from error
        train, sha256 = store.train, store.sha256
        unique_tokens = self.config.unique_tokens
        if unique_tokens is not None:
            num_tokens = len(train.tokens)
            require(
                unique_tokens <= num_tokens,
                "corpus.unique_tokens",
                f"must be at most the corpus's {num_tokens} training tokens",
                unique_tokens,
            )
            train = train.of_unique_tokens(unique_tokens)
            sha256 = json_sha256({"store": sha256, "unique_tokens": unique_tokens})
        return OpenCorpus(
            train=FixedDocuments(train),
            validation=FixedDocuments(store.validation),
            tokenizer=tokenizer,
            store=store,
            sha256=sha256,
        )

    def tokenise(
        self, tokenizer: TextTokenizer, cache_dir: Path, processes: int | None = None
    ) -> TokenStore:
        """The token store in ``cache_dir``, built if it has none."""
        return open_store(
            self.documents(),
            tokenizer,
            cache_dir=cache_dir,
            key={"texts": self.training_texts_key, "cutting": self.cutting},
            dtype=self.config.store_dtype,
            min_document_tokens=self.config.min_document_tokens,
            near_duplicate_tokens=self.config.near_duplicate_tokens,
            total_bytes=self.num_bytes,
            processes=processes,
        )

    def _split_entries(self) -> Iterator[tuple[Split, Entry]]:
        count = {Split.train: 0, Split.validation: 0}
        for entry in self.entries():
            digest = hashlib.blake2b(entry.text.encode(), digest_size=8).digest()
            held_out = int.from_bytes(digest) < self.config.validation_fraction * 2**64
            split = Split.validation if held_out else Split.train
            count[split] += 1
            yield split, entry
        entries = sum(count.values())
        require(
            entries >= 2,
            "corpus",
            "must hold at least two source entries (a row, or a whole text file), to hold one out",
            entries,
        )
        if not all(count.values()):
            raise UserError(
                "corpus.validation_fraction must leave source entries on both sides of the split, "
                f"got {self.config.validation_fraction} of {entries} entries "
                f"({count[Split.train]} train, {count[Split.validation]} validation)"
            )
