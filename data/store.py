"""The token store: a corpus tokenised once, memory-mapped ever after.

A folder ``<cache_dir>/stores/<key>/`` holds, for ``train`` and ``validation``, the text tokens end
to end (``.bin``, little-endian uint16 or uint32, no special tokens) and where each document begins
(``.offsets.npy``, int64, one more than there are documents), with ``tokenizer.json`` and
``manifest.json``. The key is the hash of what made the store; the manifest has the size and SHA-256
of every file and its own, all checked when the store is opened.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from data.documents import Documents, Split, TextDocument
from data.files import exclusive_lock, file_sha256, json_sha256
from data.store_build import FORMAT_VERSION, build_store
from data.tokenizers import TextTokenizer
from kernels.errors import UserError, require

log = logging.getLogger(__name__)


class StoreDtype(StrEnum):
    """Integer type of a stored token."""

    auto = "auto"
    uint16 = "uint16"
    uint32 = "uint32"

    def resolve(self, vocab_size: int) -> np.dtype:
        """The type for a vocabulary; raises ``UserError`` if it can't hold it."""
        if self is StoreDtype.auto:
            return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.value])
        require(
            vocab_size <= 2 ** (8 * dtype.itemsize),
            "corpus.store_dtype",
            f"must hold the tokenizer's vocabulary of {vocab_size} tokens (uint32 does)",
            self.value,
        )
        return dtype


@dataclass(frozen=True)
class TokenStore:
    """An opened store."""

    path: Path
    manifest: dict
    train: Documents
    validation: Documents

    @property
    def sha256(self) -> str:
        """SHA-256 over those of tokens, offsets and tokenizer, whatever they were made from."""
        return self.manifest["content_sha256"]

    def describe(self) -> list[str]:
        """Lines of text: sizes, lengths of documents, what was dropped."""
        lines = [f"token store {self.path} ({self.manifest['dtype']}, sha256 {self.sha256[:12]})"]
        for split in Split:
            part = self.manifest["splits"][split.value]
            quantiles = ", ".join(f"{q} % {n:g}" for q, n in part["length_quantiles"])
            lines += [
                f"{split.value}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
                f"{part['text_bytes']:,} bytes of text, {part['dropped']:,} documents dropped"
                + self._near_duplicates(part),
                f"  tokens a document: mean {part['length_mean']:.1f}, quantiles {quantiles}; "
                f"{part['share_of_64_tokens']:.1%} have at least 64",
            ]
        return lines

    def _near_duplicates(self, part: dict) -> str:
        if not part["near_duplicates"]:
            return ""
        run = self.manifest["near_duplicate_tokens"]
        return f", {part['near_duplicates']:,} that share {run} tokens with training text left out"


def open_store(
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    *,
    cache_dir: Path,
    key: dict,
    dtype: StoreDtype,
    min_document_tokens: int,
    near_duplicate_tokens: int = 0,
    total_bytes: Callable[[], int | None] = lambda: None,
    processes: int | None = None,
) -> TokenStore:
    """The store of ``documents``, built if the cache has none; other processes wait for it.

    ``key`` is what the documents depend on, as JSON; only to build are they iterated, and the size
    of their text asked for. An interrupted build goes on where it stopped. processes: None is one a
    core.

    Raises ``UserError`` if the store is damaged, of another version, or can't be built.
    """
    resolved = dtype.resolve(tokenizer.vocab_size)
    key = {
        "format_version": FORMAT_VERSION,
        "corpus": key,
        "min_document_tokens": min_document_tokens,
        "near_duplicate_tokens": near_duplicate_tokens,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": resolved.name,
    }
    path = cache_dir / "stores" / json_sha256(key)[:20]
    with exclusive_lock(path.with_suffix(".lock")):
        if path.exists():
            # What a build left that was killed in its last moment.
            shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
        else:
            log.info("Tokenising the corpus: %s", path)
            build_store(
                path,
                documents,
                tokenizer,
                key=key,
                dtype=resolved,
                total_bytes=total_bytes(),
                processes=processes,
            )
    return read_store(path)


def read_store(path: Path) -> TokenStore:
    """Open and check the store in a folder.

    Raises ``UserError`` naming the file that is missing, damaged or of an unknown version.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, name, "it is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise _damaged(path, name, f"it has {size} bytes instead of {expected['bytes']}")
        if file_sha256(file) != expected["sha256"]:
            raise _damaged(path, name, "its SHA-256 is not the manifest's")
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    parts = {split: _documents(path, split, dtype) for split in Split}
    return TokenStore(path, manifest, parts[Split.train], parts[Split.validation])


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, digest = manifest["format_version"], manifest["sha256"]
    except FileNotFoundError:
        raise _damaged(path, "manifest.json", "it is missing") from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "manifest.json", "it is not a manifest") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"token store must have format version {FORMAT_VERSION}, got {version!r} in {path} "
            "(delete the folder and it is built again)"
        )
    if json_sha256({name: value for name, value in manifest.items() if name != "sha256"}) != digest:
        raise _damaged(path, "manifest.json", "its SHA-256 is not its own")
    return manifest


def _documents(path: Path, split: Split, dtype: np.dtype) -> Documents:
    offsets_N1 = np.load(path / f"{split.value}.offsets.npy", allow_pickle=False)
    tokens = np.memmap(path / f"{split.value}.bin", dtype=dtype, mode="r")
    return Documents.end_to_end(np.asarray(tokens), offsets_N1)


def _damaged(path: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"token store must be intact, got a damaged {path / name}: {reason} "
        "(delete the folder and it is built again)"
    )
