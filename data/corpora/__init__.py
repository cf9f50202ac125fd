"""Corpora: where documents come from. A new kind is its file and one line here."""

from pathlib import Path

from data.corpora.austen import AustenConfig, AustenCorpus
from data.corpora.base import OpenCorpus, TextCorpus, TextCorpusConfig
from data.corpora.bigram_backcopy import BigramBackcopyConfig, BigramBackcopyCorpus
from data.corpora.files import FilesConfig, FilesCorpus
from data.corpora.hub import HubConfig, HubCorpus
from data.tokenizers import TokenizerConfig

__all__ = [
    "CORPORA",
    "AustenConfig",
    "BigramBackcopyConfig",
    "CorpusConfig",
    "FilesConfig",
    "HubConfig",
    "OpenCorpus",
    "open_corpus",
]

CORPORA: dict[str, type[TextCorpus] | type[BigramBackcopyCorpus]] = {
    "austen": AustenCorpus,
    "files": FilesCorpus,
    "hub": HubCorpus,
    "bigram_backcopy": BigramBackcopyCorpus,
}

CorpusConfig = TextCorpusConfig | BigramBackcopyConfig


def open_corpus(
    config: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    cache_dir: Path,
    processes: int | None = None,
) -> OpenCorpus:
    """The corpus of ``config``, tokenised if it isn't yet. processes: None is one a core.

    Raises ``UserError`` if it can't be used.
    """
    kind = next(kind for kind in CORPORA.values() if kind.Config is type(config))
    return kind(config, cache_dir).open(tokenizer_config, processes)
