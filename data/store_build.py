"""Writing a token store: documents are tokenised in shards, and the shards put together.

The store appears under its name only when it is complete and on the disk; its bytes depend on the
documents and the tokenizer alone. Until then its shards lie beside it, and an interrupted build
goes on with them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import Documents, Split, TextDocument
from data.files import file_sha256, json_sha256, sync, sync_folder
from data.near_duplicates import repeats_training
from data.progress import Progress
from data.shards import ShardPart, read_shard, tokenise
from data.tokenizers import TextTokenizer
from kernels.errors import UserError

FORMAT_VERSION = 2
"""Version of the folder's layout and of the manifest."""

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def build_store(
    path: Path,
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    *,
    key: dict[str, Any],
    dtype: np.dtype,
    total_bytes: int | None = None,
    processes: int | None = None,
) -> None:
    """Write the store ``path``, whole or not at all; the caller holds its lock.

    total_bytes: the text's size, about, for the progress bar. processes: None is one a core.
    Raises ``UserError`` if a side of the split keeps no document.
    """
    partial = path.with_suffix(".partial")
    with Progress("tokenising", total_bytes) as progress:
        shards = tokenise(
            documents,
            tokenizer,
            partial / "shards",
            dtype=dtype,
            min_tokens=key["min_document_tokens"],
            progress=progress,
            processes=processes,
        )
    try:
        store = partial / "store"
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
        splits = _write_splits(store, shards, tokenizer.vocab_size, key, dtype)
        tokenizer.save(store / "tokenizer.json")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(store.iterdir())
        }
        manifest = {**key, "vocab_size": tokenizer.vocab_size, "splits": splits, "files": files}
        manifest["content_sha256"] = json_sha256({n: file["sha256"] for n, file in files.items()})
        manifest["sha256"] = json_sha256(manifest)
        with (store / "manifest.json").open("w") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
            sync(file)
        sync_folder(store)
        store.rename(path)
        sync_folder(path.parent)
    except UserError:
        # Nothing that trying again could finish.
        shutil.rmtree(partial)
        raise
    shutil.rmtree(partial)


def _write_splits(
    folder: Path, shards: list[Path], vocab_size: int, key: dict[str, Any], dtype: np.dtype
) -> dict[str, dict[str, Any]]:
    """Put the shards together; the figures of both sides of the split."""
    parts = {split: _SplitFiles(folder, split, dtype) for split in Split}
    for split, part in parts.items():
        part.write(read_shard(path)[split] for path in shards)
        if not len(part.lengths_N):
            raise UserError(
                f"corpus.min_document_tokens must leave documents on the {split} side, "
                f"got {key['min_document_tokens']}: all {part.dropped} are shorter"
            )
    run_tokens = key["near_duplicate_tokens"]
    if run_tokens:
        held_out = parts[Split.validation]
        held_out.leave_out(
            repeats_training(
                held_out.documents(), parts[Split.train].documents(), vocab_size, run_tokens
            )
        )
        if not len(held_out.lengths_N):
            raise UserError(
                "corpus.near_duplicate_tokens must leave documents on the validation side, "
                f"got {run_tokens}: all share that many tokens in a row with training text"
            )
    return {split.value: part.finish() for split, part in parts.items()}


class _SplitFiles:
    """The files of one side of the split, and the figures of its documents."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype):
        self.lengths_N = self._bytes_N = np.zeros(0, np.int64)
        self.dropped = 0
        self._near_duplicates = 0
        self._tokens_path = folder / f"{split}.bin"
        self._offsets_path = folder / f"{split}.offsets.npy"
        self._dtype = dtype

    def write(self, parts: Iterable[ShardPart]) -> None:
        lengths, text_bytes = [self.lengths_N], [self._bytes_N]
        with self._tokens_path.open("wb") as file:
            for part in parts:
                file.write(part.tokens.tobytes())
                lengths.append(part.lengths_N)
                text_bytes.append(part.bytes_N)
                self.dropped += part.dropped
            sync(file)
        self.lengths_N, self._bytes_N = np.concatenate(lengths), np.concatenate(text_bytes)

    def documents(self) -> Documents:
        """What was written, as it lies on the disk."""
        tokens = np.memmap(self._tokens_path, self._dtype, "r")
        return Documents.end_to_end(tokens, np.append(0, self.lengths_N.cumsum()))

    def leave_out(self, left_out_N: np.ndarray) -> None:
        """Write the file anew without these documents."""
        documents = self.documents()
        partial = self._tokens_path.with_suffix(".kept")
        with partial.open("wb") as file:
            for n in np.flatnonzero(~left_out_N):
                start = documents.starts_N[n]
                file.write(documents.tokens[start : start + documents.lengths_N[n]].tobytes())
            sync(file)
        partial.rename(self._tokens_path)
        self._near_duplicates = int(left_out_N.sum())
        self.lengths_N, self._bytes_N = self.lengths_N[~left_out_N], self._bytes_N[~left_out_N]

    def finish(self) -> dict[str, Any]:
        """Write the offsets; the figures of this side for the manifest."""
        lengths_N = self.lengths_N
        with self._offsets_path.open("wb") as file:
            np.save(file, np.append(0, lengths_N.cumsum()).astype("<i8"))
            sync(file)
        quantiles = np.percentile(lengths_N, _QUANTILES).tolist()
        return {
            "documents": len(lengths_N),
            "tokens": int(lengths_N.sum()),
            "text_bytes": int(self._bytes_N.sum()),
            "dropped": self.dropped,
            "near_duplicates": self._near_duplicates,
            "length_quantiles": [list(pair) for pair in zip(_QUANTILES, quantiles, strict=True)],
            "length_mean": float(lengths_N.mean()),
            "share_of_64_tokens": float((lengths_N >= 64).mean()),
        }
