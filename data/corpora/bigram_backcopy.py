"""Bigram-Backcopy (arXiv 2410.13835): generated documents, unlimited, with a known optimal loss."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.backcopy import BackcopyProcess
from data.corpora.austen import AustenConfig, AustenCorpus
from data.corpora.base import OpenCorpus
from data.documents import Documents, FixedDocuments
from data.files import json_sha256
from data.store import TokenStore
from data.tokenizers import TextTokenizer, TokenizerConfig
from kernels.errors import UserError, require

_TRAIN, _VALIDATION = 0, 1


@dataclass(kw_only=True)
class BigramBackcopyConfig:
    """Settings of the generated corpus; its bigrams are those of the shipped text."""

    num_triggers: int = 3
    """How many of the text's most frequent tokens are triggers."""

    triggers: list[str] | None = None
    """The triggers by name instead, each the text of one token; null = by num_triggers."""

    document_tokens: int = 255
    """Tokens of every document, BOS and EOS not counted; 255 and a BOS fill a row of 256."""

    documents: int = 4096
    """Documents generated for an epoch; every epoch has fresh ones."""

    validation_documents: int = 512
    """Documents held out, the same for every run with this seed."""

    seed: int = 0
    """Seed of the generated documents; it is part of the corpus, like a file's content."""

    def __post_init__(self):
        require(self.num_triggers >= 1, "corpus.num_triggers", "must be >= 1", self.num_triggers)
        require(
            self.triggers is None or len(self.triggers) > 0,
            "corpus.triggers",
            "must name at least one token, or be null",
            self.triggers,
        )
        require(
            self.document_tokens >= 3,
            "corpus.document_tokens",
            "must be >= 3",
            self.document_tokens,
        )
        require(self.documents >= 1, "corpus.documents", "must be >= 1", self.documents)
        require(
            self.validation_documents >= 1,
            "corpus.validation_documents",
            "must be >= 1",
            self.validation_documents,
        )
        require(self.seed >= 0, "corpus.seed", "must be >= 0", self.seed)


class BigramBackcopyCorpus:
    """Documents of ``BackcopyProcess`` over the training side of the shipped text."""

    Config = BigramBackcopyConfig

    def __init__(self, config: BigramBackcopyConfig, cache_dir: Path):
        self.config = config
        self.cache_dir = cache_dir

    def open(self, tokenizer_config: TokenizerConfig, processes: int | None = None) -> OpenCorpus:
        """Tokenizer and process; raises ``UserError`` for triggers that can't be used."""
        text = AustenCorpus(AustenConfig(), self.cache_dir).open(tokenizer_config, processes)
        trigger_ids = self._trigger_ids(text.tokenizer, text.store)
        process = BackcopyProcess(text.store.train, text.tokenizer.vocab_size, trigger_ids)
        config = self.config
        validation = GeneratedDocuments(process, config, _VALIDATION, config.validation_documents)
        return OpenCorpus(
            train=GeneratedDocuments(process, config, _TRAIN, config.documents),
            validation=FixedDocuments(validation.epoch(0)),
            tokenizer=text.tokenizer,
            store=text.store,
            sha256=json_sha256({"text": text.sha256, "bigram_backcopy": asdict(config)}),
            process=process,
        )

    def _trigger_ids(self, tokenizer: TextTokenizer, store: TokenStore) -> np.ndarray:
        count_V = np.bincount(store.train.tokens, minlength=tokenizer.vocab_size)
        occurring = int((count_V > 0).sum())
        if self.config.triggers is None:
            require(
                self.config.num_triggers < occurring,
                "corpus.num_triggers",
                f"must be below the {occurring} tokens that occur in the text",
                self.config.num_triggers,
            )
            return np.argsort(-count_V, kind="stable")[: self.config.num_triggers]
        ids = [tokenizer.token_id(trigger) for trigger in self.config.triggers]
        for trigger, index in zip(self.config.triggers, ids, strict=True):
            if index is None or not count_V[index]:
                raise UserError(
                    f"corpus.triggers must be tokens that occur in the text, got {trigger!r}"
                )
        require(
            len(set(ids)) < occurring,
            "corpus.triggers",
            "must leave tokens that are no triggers",
            self.config.triggers,
        )
        return np.unique(ids)


class GeneratedDocuments:
    """A source whose epochs are drawn from (seed, stream, epoch): nothing is kept."""

    repeats = False

    def __init__(
        self,
        process: BackcopyProcess,
        config: BigramBackcopyConfig,
        stream: int,
        num_documents: int,
    ):
        self._process = process
        self._config = config
        self._stream = stream
        self._num_documents = num_documents

    def epoch(self, epoch: int) -> Documents:
        """Fresh documents for each epoch, the same ones at every call for it."""
        rng = np.random.default_rng([self._config.seed, self._stream, epoch])
        return self._process.sample(self._num_documents, self._config.document_tokens, rng)
