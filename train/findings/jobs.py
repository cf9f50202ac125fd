"""Runs of a campaign as processes of their own, several at once, and what each printed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.gpus import VISIBLE, visible_gpus

THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Variables that say how many threads or compiling helpers a process has: one a core by default."""


def start(command: Sequence[str], log: Path, *, slot: int, jobs: int) -> subprocess.Popen:
    """Run a command as one of ``jobs`` at once, what it prints added to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(slot, jobs)
        )


def environment(slot: int, jobs: int) -> dict[str, str]:
    """This process's, with a share of the cores, unless it says how many, and one GPU in turn.

    slot: from 0 to ``jobs - 1``, no two at once alike.
    """
    told = dict(os.environ)
    share = max(1, (os.cpu_count() or 1) // jobs)
    for name in THREADS:
        told.setdefault(name, str(share))
    gpus = visible_gpus()
    if len(gpus) > 1:
        told[VISIBLE] = gpus[slot % len(gpus)]
    return told


@contextlib.contextmanager
def logged(log: Path) -> Iterator[None]:
    """What is printed in here goes to ``log``, and the traceback of what isn't the user's
    mistake."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        try:
            yield
        except Exception:
            traceback.print_exc(file=file)
            raise


def why_failed(log: Path, offset: int) -> str:
    """Why a run failed: the user's mistake with which its log ends, or where to look.

    offset: of what the run wrote, in bytes; before it are earlier starts.
    """
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    return last.removeprefix("error: ") if last.startswith("error: ") else f"see {log}"
