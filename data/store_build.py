"""Writing a token store: documents are tokenised batch by batch and appended, in bounded memory.

The store appears under its name only when it is complete and on the disk; its bytes depend on the
documents and the tokenizer alone.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import Split, TextDocument
from data.files import file_sha256, json_sha256, sync, sync_folder
from data.tokenizers import TextTokenizer
from kernels.errors import UserError

FORMAT_VERSION = 1
"""Version of the folder's layout and of the manifest."""

BATCH_CHARACTERS = 1 << 20
"""Text tokenised at once, in characters: enough to keep every thread busy."""

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def build_store(
    path: Path,
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    *,
    key: dict[str, Any],
    dtype: np.dtype,
) -> None:
    """Write the store ``path``, whole or not at all; the caller holds its lock.

    Raises ``UserError`` if a side of the split has no document of ``min_document_tokens``.
    """
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        splits = _write_splits(partial, documents, tokenizer, key["min_document_tokens"], dtype)
        tokenizer.save(partial / "tokenizer.json")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(partial.iterdir())
        }
        manifest = {**key, "vocab_size": tokenizer.vocab_size, "splits": splits, "files": files}
        manifest["sha256"] = json_sha256(manifest)
        with (partial / "manifest.json").open("w") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
            sync(file)
        sync_folder(partial)
        partial.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_splits(
    folder: Path,
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    min_tokens: int,
    dtype: np.dtype,
) -> dict[str, dict[str, Any]]:
    """Tokenise the documents into the files of both splits; the figures of each."""
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(_SplitWriter(folder, split, dtype)) for split in Split
        }
        for batch in _batches(documents):
            ids = tokenizer.encode_batch([document.text for document in batch])
            for document, tokens in zip(batch, ids, strict=True):
                writers[document.split].append(tokens, document.text, min_tokens)
        figures = {split.value: writer.finish() for split, writer in writers.items()}
    for name, part in figures.items():
        if not part["documents"]:
            raise UserError(
                f"corpus.min_document_tokens must leave documents on the {name} side, "
                f"got {min_tokens}: all {part['dropped']} are shorter"
            )
    return figures


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends the documents of one side of the split to its files."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype):
        self._offsets_path = folder / f"{split.value}.offsets.npy"
        self._file = (folder / f"{split.value}.bin").open("wb")
        self._dtype = dtype
        self._lengths = array("q")
        self._text_bytes = 0
        self._dropped = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, ids: list[int], text: str, min_tokens: int) -> None:
        if len(ids) < min_tokens:
            self._dropped += 1
            return
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._lengths.append(len(ids))
        self._text_bytes += len(text.encode())

    def finish(self) -> dict[str, Any]:
        """Write the offsets and flush; the figures of this side for the manifest."""
        sync(self._file)
        lengths_N = np.array(self._lengths, np.int64)
        with self._offsets_path.open("wb") as file:
            np.save(file, np.concatenate([[0], lengths_N.cumsum()]).astype("<i8"))
            sync(file)
        figures: dict[str, Any] = {
            "documents": len(lengths_N),
            "tokens": int(lengths_N.sum()),
            "text_bytes": self._text_bytes,
            "dropped": self._dropped,
        }
        if len(lengths_N):
            quantiles = np.percentile(lengths_N, _QUANTILES).tolist()
            figures["length_quantiles"] = [
                list(pair) for pair in zip(_QUANTILES, quantiles, strict=True)
            ]
            figures["length_mean"] = float(lengths_N.mean())
            figures["share_of_64_tokens"] = float((lengths_N >= 64).mean())
        return figures
