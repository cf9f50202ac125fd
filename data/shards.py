"""Tokenising in shards, in several processes; what an interrupted build has done is kept.

A shard is a run of consecutive documents, cut where their text reaches a size. A worker writes it
whole, with a digest of the texts that it was made from. A later build keeps the shards whose texts
are still the same, so the bytes of a store depend neither on the number of processes nor on how
often it was interrupted.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.documents import Split, TextDocument
from data.files import write_atomically
from data.progress import Progress
from data.tokenizers import TextTokenizer
from kernels.errors import UserError

SHARD_CHARACTERS = 1 << 20
"""Text of a shard: about a second's work, so little is lost to an interruption."""


_SET_PARENT_DEATH_SIGNAL = 1


class ShardPart(NamedTuple):
    """The documents of one side of the split in one shard, end to end.

    Axes: N documents. ``lengths_N``: tokens, ``bytes_N``: bytes of text, int64 each. ``dropped``:
    documents that were too short.
    """

    tokens: np.ndarray
    lengths_N: np.ndarray
    bytes_N: np.ndarray
    dropped: int


class _Job(NamedTuple):
    path: Path
    digest: bytes
    num_bytes: int
    documents: list[TextDocument]


def available_cores() -> int:
    """Cores that this process may use, a container's share of them counted."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def tokenise(
    documents: Iterable[TextDocument],
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    dtype: np.dtype,
    min_tokens: int,
    progress: Progress,
    processes: int | None = None,
    shard_characters: int | None = None,
) -> list[Path]:
    """The shards of ``documents`` in ``folder``, in their order; those that are there are kept.

    processes: workers; None is one a core, 1 is this process with the library's threads.
    shard_characters: None is ``SHARD_CHARACTERS``. Memory holds a few shards' text for each worker,
    whatever the size of the corpus, and a document is in one shard, whatever its own. Raises
    ``UserError`` if a worker dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write = _Writer(tokenizer, dtype, min_tokens)
    paths: list[Path] = []
    jobs = _unfinished(
        _jobs(documents, folder, shard_characters or SHARD_CHARACTERS), paths, progress
    )
    head = list(islice(jobs, 2))
    if len(head) < 2 or processes == 1:
        # One shard isn't worth a process: the library's threads do.
        for job in chain(head, jobs):
            write(job)
            progress.add(job.num_bytes)
    else:
        _in_processes(write, chain(head, jobs), processes or available_cores(), progress)
    return paths


def read_shard(path: Path) -> dict[Split, ShardPart]:
    """Both sides of the split of a finished shard."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return {
            split: ShardPart(
                arrays[f"{split}.tokens"],
                arrays[f"{split}.lengths"],
                arrays[f"{split}.bytes"],
                int(arrays[f"{split}.dropped"]),
            )
            for split in Split
        }


def _jobs(documents: Iterable[TextDocument], folder: Path, shard_characters: int) -> Iterator[_Job]:
    batch: list[TextDocument] = []
    digest, num_bytes, characters, count = hashlib.blake2b(digest_size=16), 0, 0, 0
    for document in documents:
        text = document.text.encode()
        # Where one text ends and the next begins is part of what is digested.
        digest.update(f"{document.split} {len(text)} ".encode())
        digest.update(text)
        batch.append(document)
        num_bytes += len(text)
        characters += len(document.text)
        if characters >= shard_characters:
            yield _Job(folder / f"{count:08d}.npz", digest.digest(), num_bytes, batch)
            batch, count = [], count + 1
            digest, num_bytes, characters = hashlib.blake2b(digest_size=16), 0, 0
    if batch:
        yield _Job(folder / f"{count:08d}.npz", digest.digest(), num_bytes, batch)


def _unfinished(jobs: Iterable[_Job], paths: list[Path], progress: Progress) -> Iterator[_Job]:
    """The jobs whose shard isn't there; ``paths`` gets every job's."""
    kept = 0
    for job in jobs:
        paths.append(job.path)
        if _is_there(job):
            progress.skip(job.num_bytes)
            kept += 1
        else:
            yield job
    if kept:
        print(f"{kept} of {len(paths)} parts were tokenised before", file=sys.stderr)


def _is_there(job: _Job) -> bool:
    try:
        # Reading every array checks its sum.
        read_shard(job.path)
        with np.load(io.BytesIO(job.path.read_bytes()), allow_pickle=False) as arrays:
            return arrays["digest"].tobytes() == job.digest
    except Exception:
        # Whatever is wrong with a file (a damaged zip raises a dozen kinds), it is made anew.
        return False


class _Writer:
    """Tokenises a job's documents and writes their shard."""

    def __init__(self, tokenizer: TextTokenizer, dtype: np.dtype, min_tokens: int):
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._min_tokens = min_tokens

    def __call__(self, job: _Job) -> None:
        ids = self._tokenizer.encode_batch([document.text for document in job.documents])
        arrays = {"digest": np.frombuffer(job.digest, np.uint8)}
        for split in Split:
            pairs = [
                (document, tokens)
                for document, tokens in zip(job.documents, ids, strict=True)
                if document.split is split
            ]
            kept = [pair for pair in pairs if len(pair[1]) >= self._min_tokens]
            pieces = [np.array(tokens, self._dtype) for _, tokens in kept]
            arrays[f"{split}.tokens"] = np.concatenate([np.empty(0, self._dtype), *pieces])
            arrays[f"{split}.lengths"] = np.array([len(piece) for piece in pieces], np.int64)
            arrays[f"{split}.bytes"] = np.array(
                [len(document.text.encode()) for document, _ in kept], np.int64
            )
            arrays[f"{split}.dropped"] = np.array(len(pairs) - len(kept))
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_atomically(job.path, content.getvalue())


_write_in_worker: _Writer


def _start_worker(write: _Writer, parent: int) -> None:
    global _write_in_worker
    _write_in_worker = write
    # A worker holds its parent's lock on the store: it must not outlive a parent that is killed.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    # The library's threads don't survive a fork, and each worker has one core anyway.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole group; the parent tells the workers to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not the parent's way of stopping: a worker has nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(job: _Job) -> int:
    _write_in_worker(job)
    return job.num_bytes


def _in_processes(write: _Writer, jobs: Iterable[_Job], processes: int, progress: Progress) -> None:
    pool = ProcessPoolExecutor(
        processes,
        # Forked workers have the tokenizer as it is, and import nothing.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(write, os.getpid()),
    )
    running: deque[Future[int]] = deque()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads; the workers touch none.
            warnings.filterwarnings("ignore", "(?s).*use of fork", DeprecationWarning)
            with _uninterrupted():
                # Forks every worker.
                pool.submit(_nothing)
            for job in jobs:
                running.append(pool.submit(_work, job))
                if len(running) > 2 * processes:
                    progress.add(running.popleft().result())
            while running:
                progress.add(running.popleft().result())
    except BrokenProcessPool as error:
        pool.shutdown(cancel_futures=True)
        raise UserError(
            "tokenising processes must stay alive (too little memory?), got one that died; the "
            "same command goes on where it stopped"
        ) from error
    except BaseException:
        # Without waiting for their shards, which are whole or not there: a second Ctrl-C must not
        # find this process waiting. (Python 3.14 has a public method for it.)
        with _uninterrupted():
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: between a fork and its entry in the books, a worker would be forgotten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _nothing() -> None:
    pass
