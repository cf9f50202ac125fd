"""Reading texts with the ``datasets`` library: quietly, in bounded memory, one clear error."""

import bz2
import glob
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

from kernels.errors import UserError

ROWS_A_BLOCK = 256
"""Rows fetched at once: Arrow rows are costly to fetch one by one."""

_SAMPLE_BYTES = 1 << 22
_COMPRESSIONS = (".xz", ".gz", ".zst", ".bz2")
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def expand_globs(patterns: list[str], setting: str) -> list[Path]:
    """The files that match any of the patterns, sorted, each once.

    Raises ``UserError`` for a pattern that matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = {Path(match).resolve() for match in matches if Path(match).is_file()}
        if not files:
            raise UserError(f"{setting} must match at least one file, got {pattern!r}")
        found |= files
    return sorted(found)


def read_file(path: Path, text_field: str, cache_dir: Path, *, rule: str) -> Iterator[str]:
    """The texts of one jsonl, parquet or plain text file (a text file is one text).

    Raises ``UserError``, beginning with ``rule``, if the file can't be read.
    """
    kind = _file_kind(path)
    return _texts(
        lambda: _open_file(path, kind, cache_dir),
        "text" if kind == "text" else text_field,
        str(path),
        rule,
    )


def read_dataset(
    name: str,
    *,
    subset: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    text_field: str,
    cache_dir: Path,
) -> Iterator[str]:
    """The texts of a data set of the hub, or of a local folder laid out like one.

    Raises ``UserError`` if it can't be found or read.
    """

    def load():
        return _datasets().load_dataset(
            name,
            subset,
            split=split,
            revision=revision,
            streaming=streaming,
            cache_dir=str(cache_dir / "datasets"),
        )

    return _texts(load, text_field, name, "corpus.name must name a data set that can be read")


def text_bytes(paths: list[Path]) -> int | None:
    """Bytes of text in files, about: what a progress bar needs. None where nobody knows quickly.

    Of a compressed file the first megabytes tell how far it is packed; a parquet file says.
    """
    sizes = [_text_bytes(path) for path in paths]
    return None if not sizes or None in sizes else sum(sizes)


def _text_bytes(path: Path) -> int | None:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path).metadata
            return sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
        size = path.stat().st_size
        opener = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix)
        if opener is None:
            return None if path.suffix in _COMPRESSIONS else size
        with path.open("rb") as packed, opener(packed) as unpacked:
            length = len(unpacked.read(_SAMPLE_BYTES))
            # A short file ends within the sample.
            return length if length < _SAMPLE_BYTES else length * size // packed.tell()
    except Exception:
        # Reading says what is wrong with a file, a guess of its size needn't.
        return None


def _open_file(path: Path, kind: str, cache_dir: Path):
    # The readers behind Dataset.from_json and its like: load_dataset would report each use of a
    # format over the network.
    from datasets.io.json import JsonDatasetReader
    from datasets.io.parquet import ParquetDatasetReader
    from datasets.io.text import TextDatasetReader

    _datasets()
    settings = {"split": "train", "streaming": True, "cache_dir": str(cache_dir / "datasets")}
    if kind == "json":
        return JsonDatasetReader(str(path), **settings).read()
    if kind == "parquet":
        return ParquetDatasetReader(str(path), **settings).read()
    return TextDatasetReader(str(path), sample_by="document", **settings).read()


def _file_kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
    return _KINDS.get(suffixes[-1] if suffixes else "", "text")


def _datasets():
    """The library, imported late (seconds) and silenced: its failures arrive as exceptions."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _texts(load: Callable, text_field: str, what: str, rule: str) -> Iterator[str]:
    try:
        blocks = load().with_format("arrow").iter(batch_size=ROWS_A_BLOCK)
        for block in blocks:
            yield from _column(block, text_field, what)
    except UserError:
        raise
    except StopIteration:
        # The library's word for a json file without rows.
        return
    except Exception as error:
        # Whatever a damaged file, a missing split or a dead network raises in here (OSError,
        # ArrowInvalid, LZMAError, HTTP errors, ...), the user's answer is the same.
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{rule}, got {what}: {type(error).__name__}: {reason[:300]}") from error


def _column(block, text_field: str, what: str) -> list[str]:
    if text_field not in block.column_names:
        raise UserError(
            f"corpus.text_field must be a field of {what} ({', '.join(block.column_names)}), "
            f"got {text_field!r}"
        )
    texts = block[text_field].to_pylist()
    for text in texts:
        if not isinstance(text, str | None):
            raise UserError(
                f"corpus.text_field must hold text in {what}, got {type(text).__name__}"
                f" in {text_field!r}"
            )
    return [text or "" for text in texts]
