"""Tokenizers: trained on the corpus, read from a file, or taken from the hub.

BOS, EOS and PAD are given as token strings and looked up as ids. A trained tokenizer gets all
three, distinct; one from a file or the hub must have them, unless the setting is null.
Text that spells a special token is encoded as ordinary text. Adding BOS and EOS is left to packing.
"""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.files import exclusive_lock, json_sha256, write_atomically
from data.progress import watched
from data.token_bytes import bytes_per_token
from kernels.errors import UserError, require

log = logging.getLogger(__name__)

UNKNOWN = "<unk>"
"""What ``characters`` makes of a character that the training text lacks."""

_FORMAT_VERSION = 1


class TrainingText(Protocol):
    """What a tokenizer is trained on: texts, and what they depend on as JSON."""

    training_texts_key: dict

    def training_texts(self) -> Iterator[str]: ...

    def num_bytes(self) -> int | None: ...


@dataclass(kw_only=True)
class TokenizerConfig:
    """Settings of every tokenizer: the special tokens, as strings."""

    bos: str | None = "<bos>"
    """Token that begins a document or a row; null = the tokenizer has none."""

    eos: str | None = "<eos>"
    """Token that ends a document; null = the tokenizer has none."""

    pad: str | None = "<pad>"
    """Token that fills rows; null = id 0 fills them (padding is neither seen nor predicted)."""

    bos_may_be_eos: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("bos", "eos", "pad"):
            require(getattr(self, name) != "", f"tokenizer.{name}", "must be a token or null", "")
        if self.pad is not None:
            require(
                self.pad not in (self.bos, self.eos),
                "tokenizer.pad",
                "must differ from tokenizer.bos and tokenizer.eos",
                self.pad,
            )
        if self.bos is not None and not self.bos_may_be_eos:
            require(
                self.bos != self.eos, "tokenizer.bos", "must differ from tokenizer.eos", self.bos
            )

    @property
    def specials(self) -> list[str]:
        """The special tokens that are set, each once."""
        return list(dict.fromkeys(token for token in (self.bos, self.eos, self.pad) if token))


class TextTokenizer(ABC):
    """A tokenizer with its special ids; each kind says in ``load`` where it comes from.

    Axes: V token ids. ``vocab_size`` is the largest id + 1, what an embedding needs. ``bos_id``,
    ``eos_id`` and ``pad_id`` are None where the setting is null. ``sha256`` is that of the
    serialised tokenizer.

    Raises ``UserError`` if a special token is not in the vocabulary.
    """

    Config: ClassVar[type[TokenizerConfig]]

    def __init__(self, core: tokenizers.Tokenizer, config: TokenizerConfig):
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        self._core = core
        self.vocab_size = max(core.get_vocab().values()) + 1
        self.bos_id = self._special_id("bos", config.bos)
        self.eos_id = self._special_id("eos", config.eos)
        self.pad_id = self._special_id("pad", config.pad)

    @classmethod
    @abstractmethod
    def load(cls, config: TokenizerConfig, corpus: TrainingText, cache_dir: Path) -> Self:
        """The tokenizer that ``config`` describes.

        Raises ``UserError`` if it can't be had.
        """

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, no special token added."""
        # Loader workers, forked later, never tokenise: the library's warning about parallelism
        # before a fork would be noise, and naming the default keeps it quiet.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encodings = self._core.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return self._core.decode(ids, skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        """The id of the one token that is ``text``, given as text or as the token itself."""
        index = self._core.token_to_id(text)
        if index is not None:
            return index
        ids = self.encode_batch([text])[0]
        return ids[0] if len(ids) == 1 and ids[0] != self._unknown_id else None

    @property
    def _unknown_id(self) -> int | None:
        return self._core.token_to_id(getattr(self._core.model, "unk_token", None) or "")

    @cached_property
    def text_ids(self) -> np.ndarray:
        """int64, ascending: ids that stand for text; special and unknown tokens don't."""
        added = self._core.get_added_tokens_decoder()
        others = {index for index, token in added.items() if token.special}
        others |= {self._unknown_id, self.bos_id, self.eos_id, self.pad_id}
        return np.array(sorted(set(self._core.get_vocab().values()) - others), np.int64)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the serialised tokenizer."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def bytes_per_token_V(self) -> np.ndarray:
        """int64: UTF-8 bytes of text that each token stands for; 0 for special tokens.

        An unknown token counts as one byte, since what it replaced is lost.
        """
        return bytes_per_token(self._core, self.vocab_size)

    def to_bytes(self) -> bytes:
        """The content of its tokenizer.json."""
        return self._core.to_str().encode()

    def save(self, path: Path) -> None:
        """Write its tokenizer.json, which ``tokenizers`` and ``transformers`` read."""
        write_atomically(path, self.to_bytes())

    def _special_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        index = self._core.token_to_id(token)
        require(
            index is not None,
            f"tokenizer.{name}",
            f"must be in the tokenizer's vocabulary of {self.vocab_size} tokens, or null",
            token,
        )
        return index


@dataclass(kw_only=True)
class BpeConfig(TokenizerConfig):
    """Settings of a byte-level BPE trained on the corpus."""

    vocab_size: int = 1024
    """Tokens wanted, 256 bytes and the special ones included; a small corpus may yield fewer."""

    bos_may_be_eos: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        fewest = 256 + len(self.specials)
        require(
            self.vocab_size >= fewest,
            "tokenizer.vocab_size",
            f"must be >= {fewest} (256 bytes and the special tokens)",
            self.vocab_size,
        )


class BpeTokenizer(TextTokenizer):
    """Byte-level byte-pair encoding: every text can be encoded, none is normalised."""

    Config = BpeConfig

    @classmethod
    def load(cls, config: BpeConfig, corpus: TrainingText, cache_dir: Path) -> Self:
        def train() -> tokenizers.Tokenizer:
            core = tokenizers.Tokenizer(models.BPE())
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=config.specials,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            texts = watched(
                corpus.training_texts(), "reading for the tokenizer", corpus.num_bytes()
            )
            core.train_from_iterator(texts, trainer)
            return core

        key = {
            "kind": "bpe",
            "vocab_size": config.vocab_size,
            "specials": config.specials,
            "texts": corpus.training_texts_key,
        }
        return cls(_cached(key, train, cache_dir), config)


@dataclass(kw_only=True)
class CharactersConfig(TokenizerConfig):
    """Settings of a tokenizer with one token a character of the training text."""

    bos_may_be_eos: ClassVar[bool] = False


class CharactersTokenizer(TextTokenizer):
    """One token a character; characters that the training text lacks become ``UNKNOWN``."""

    Config = CharactersConfig

    @classmethod
    def load(cls, config: CharactersConfig, corpus: TrainingText, cache_dir: Path) -> Self:
        def train() -> tokenizers.Tokenizer:
            characters: set[str] = set()
            for text in corpus.training_texts():
                characters.update(text)
            tokens = [*config.specials, UNKNOWN, *sorted(characters)]
            # Byte-pair encoding without merges leaves single characters.
            model = models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[],
                unk_token=UNKNOWN,
            )
            core = tokenizers.Tokenizer(model)
            core.decoder = decoders.Fuse()
            core.add_special_tokens(config.specials)
            return core

        texts_key = corpus.training_texts_key
        key = {"kind": "characters", "specials": config.specials, "texts": texts_key}
        return cls(_cached(key, train, cache_dir), config)


@dataclass(kw_only=True)
class FileConfig(TokenizerConfig):
    """Settings of a tokenizer from a file."""

    path: str = ""
    """A tokenizer.json of the ``tokenizers`` library."""

    def __post_init__(self):
        super().__post_init__()
        require(self.path != "", "tokenizer.path", "must name a tokenizer.json", self.path)


class FileTokenizer(TextTokenizer):
    """A tokenizer.json as it is."""

    Config = FileConfig

    @classmethod
    def load(cls, config: FileConfig, corpus: TrainingText, cache_dir: Path) -> Self:
        path = Path(config.path).expanduser()
        require(path.is_file(), "tokenizer.path", "must be an existing file", config.path)
        return cls(_read(path, "tokenizer.path must be a tokenizer.json"), config)


@dataclass(kw_only=True)
class HubTokenizerConfig(TokenizerConfig):
    """Settings of a tokenizer from the hub."""

    name: str = ""
    """The model whose tokenizer.json is taken, owner/name."""

    revision: str = "main"
    """Branch, tag or commit; it is fetched once, then the cache's copy is used."""

    def __post_init__(self):
        super().__post_init__()
        require(self.name != "", "tokenizer.name", "must name a model of the hub", self.name)


class HubTokenizer(TextTokenizer):
    """A tokenizer of the Hugging Face hub, kept in the cache."""

    Config = HubTokenizerConfig

    @classmethod
    def load(cls, config: HubTokenizerConfig, corpus: TrainingText, cache_dir: Path) -> Self:
        def fetch() -> tokenizers.Tokenizer:
            try:
                return tokenizers.Tokenizer.from_pretrained(config.name, revision=config.revision)
            except Exception as error:
                # The library raises bare exceptions for a missing name and a dead network alike.
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"tokenizer.name must be a model of the hub that can be fetched at revision "
                    f"{config.revision!r}, got {config.name!r}: {reason}"
                ) from error

        key = {"kind": "hub", "name": config.name, "revision": config.revision}
        return cls(_cached(key, fetch, cache_dir), config)


TOKENIZERS: dict[str, type[TextTokenizer]] = {
    "bpe": BpeTokenizer,
    "characters": CharactersTokenizer,
    "file": FileTokenizer,
    "hub": HubTokenizer,
}


def build_tokenizer(
    config: TokenizerConfig, corpus: TrainingText, cache_dir: Path
) -> TextTokenizer:
    """The tokenizer of ``config``, trained or fetched if the cache has none.

    Raises ``UserError`` if it can't be had or lacks a special token.
    """
    kind = next(kind for kind in TOKENIZERS.values() if kind.Config is type(config))
    return kind.load(config, corpus, cache_dir)


def read_tokenizer(path: Path, config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer that ``TextTokenizer.save`` wrote, with the special tokens of ``config``.

    Raises ``UserError`` if the file can't be read or lacks one of them.
    """
    return FileTokenizer(_read(path, "a tokenizer must be an intact tokenizer.json"), config)


def _cached(
    key: dict, make: Callable[[], tokenizers.Tokenizer], cache_dir: Path
) -> tokenizers.Tokenizer:
    digest = json_sha256({"format": _FORMAT_VERSION, **key})
    path = cache_dir / "tokenizers" / f"{digest[:20]}.json"
    with exclusive_lock(path.with_suffix(".lock")):
        if not path.exists():
            log.info("Making the %s tokenizer: %s", key["kind"], path)
            write_atomically(path, make().to_str().encode())
    return _read(path, "cached tokenizer must be intact (delete it and it is made again)")


def _read(path: Path, rule: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare exceptions.
        raise UserError(f"{rule}, got {path}: {' '.join(str(error).split())}") from error
