"""What became of a sweep's runs, whatever process or machine each was in: told at the end.

Each run leaves a file in the sweep's folder (``hydra.sweep.dir``, on a disk that all share) when it
begins, and another in its place when it ends.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from data.files import write_atomically
from train.privacy import private

FAILED = "failed"

_folders: list[Path] = []
"""Of the sweep that this process has started."""

_just_told: list[str] = []
"""Runs whose error this process has told, none having finished since: it stands above the end."""


class SweepStart(Callback):
    """Tells this process, which may run none of the jobs, where they leave what became of them."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _folders[:] = [Path(config.hydra.sweep.dir)]


class SweepJob:
    """One of a sweep's runs, by its number and overrides."""

    def __init__(self, folder: Path, number: int, overrides: list[str]):
        self.path = folder / f"run-{number:05d}.json"
        self.name = f"run {number} ({' '.join(private(overrides))})"
        self._leave(FAILED, "it was ended from outside")

    def finished(self) -> None:
        """It has made all its steps."""
        _just_told.clear()
        self._leave("finished")

    def failed(self, why: str, run_dir: Path | None) -> None:
        """It failed, as has been told; run_dir: its folder, if it has one."""
        _just_told.append(self.name)
        self._leave(FAILED, why, run_dir)

    def _leave(self, how: str, why: str = "", run_dir: Path | None = None) -> None:
        # Its other ranks know no more.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            return
        told = {"name": self.name, "how": how, "why": private(why)}
        told["run_dir"] = None if run_dir is None else str(run_dir)
        # A full disk is told of elsewhere.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(told).encode())


def forget_sweep() -> None:
    """This process has started none."""
    _folders.clear()
    _just_told.clear()


def sweep_summary() -> list[str]:
    """What became of the runs of the sweep that this process started, a line for each that failed;
    nothing if there was no sweep. Why it failed is left out where that has just been told."""
    files = [path for folder in _folders for path in sorted(folder.glob("run-*.json"))]
    runs = [json.loads(path.read_text()) for path in files]
    failed = [run for run in runs if run["how"] == FAILED]
    if not runs:
        return []
    if not failed:
        return [f"sweep    all {len(runs)} runs are finished"]
    finished = f"{len(runs) - len(failed)} of {len(runs)} runs are finished"
    lines = [f"sweep    {finished}, {len(failed)} failed; the same command runs these again:"]
    for run in failed:
        where = "" if run["run_dir"] is None else f", in {run['run_dir']}"
        why = "" if run["name"] in _just_told else f": {' '.join(run['why'].split())}"
        lines.append(f"  {run['name']}{where}{why}")
    return lines
