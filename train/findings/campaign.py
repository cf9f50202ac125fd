"""Making a finding's runs: what is missing, one after the other or several at once.

A run is trained, its last step probed, and its record written into its folder, then, if wanted,
among the stored ones. What has a record isn't run again, whichever finding it was made for; what
was stopped goes on from its state. Seeds come first in the order: when time is up, whole pairs are
there.
"""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data.files import exclusive_lock, write_atomically
from kernels.errors import UserError
from train.config import compose
from train.findings.base import Arm, Finding
from train.findings.budgets import Budget, Planned, difference, planned, run_dir, seeds_of
from train.findings.jobs import logged, start
from train.findings.measures import PROBED, Record, measured
from train.findings.store import record_path, store_record
from train.launch import quiet
from train.probes.of_runs import probe_run
from train.run import run
from train.run_folder import RunFolder
from train.runs import load_run
from train.stopping import StopSignals

RECORD = "record.json"
"""The record in a run's folder."""

SPENT = "spent_seconds"
"""In a run's folder, what its starts that were stopped have taken."""


class Places(NamedTuple):
    """Where things lie. runs: run folders. stored: of records, read and, if ``store``, written.
    extra: overrides of every run that say where its data lie, as ``corpus.paths``."""

    runs: Path
    stored: Path
    store: bool
    extra: tuple[str, ...] = ()


class Missing(NamedTuple):
    """What a campaign left undone: runs not begun, and what failed."""

    waiting: list[Planned]
    failed: list[str]


def plans_of(
    finding: Finding, budget: Budget, seeds: Sequence[int], extra: tuple[str, ...]
) -> list[Planned]:
    """Every run, seed by seed."""
    return [
        planned(finding, budget, arm, seed, extra)
        for seed in seeds
        for arm in finding.arms_of(budget.name)
    ]


def record_of(plan: Planned, places: Places) -> Record | None:
    """The record of a run that is done, from its folder or the stored ones; None if it isn't.

    Raises ``UserError`` if it was made with settings other than the arm's now.
    """
    for path in (record_path(places.stored, plan), run_dir(plan, places.runs) / RECORD):
        if not path.exists():
            continue
        record = Record.from_json(path)
        now = _settings((*plan.preset, *plan.own, *places.extra))
        if told := difference(record.settings, now):
            raise UserError(f"{path} is a run of other settings, move it away: {told}")
        return record
    return None


@functools.cache
def _settings(overrides: tuple[str, ...]) -> dict:
    """Composing takes a third of a second, and the seeds of an arm differ in nothing compared."""
    return compose([*overrides])[1]


def make(plan: Planned, places: Places, signals: StopSignals, *, jobs: int = 1) -> Record:
    """Train (or finish), probe and record one run; jobs: how many share the device.

    Raises ``UserError`` as a run does, and what a signal raises once the state is saved.
    """
    folder = run_dir(plan, places.runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # Another campaign may be making the same run.
    with exclusive_lock(folder.with_name(f"{folder.name}.lock")):
        if (folder / RECORD).exists():
            return Record.from_json(folder / RECORD)
        try:
            return _made(plan, places, signals, lambda: _spent(folder, began, jobs))
        except BaseException:
            if RunFolder(folder).config.exists():
                spent = _spent(folder, began, jobs)
                write_atomically(folder / SPENT, str(spent).encode())
            raise


def _spent(folder: Path, began: float, jobs: int) -> float:
    """Seconds of the device that a run has taken, in all its starts."""
    path = folder / SPENT
    before = float(path.read_text()) if path.exists() else 0.0
    return before + (time.perf_counter() - began) / jobs


def _made(
    plan: Planned, places: Places, signals: StopSignals, spent: Callable[[], float]
) -> Record:
    folder = run_dir(plan, places.runs)
    config, settings = plan.compose((*places.extra, f"run_dir='{folder}'", "resume=true"))
    # A compiler that remembers the models of all runs before gives up on compiling.
    torch.compiler.reset()
    # The run before leaves its model in cycles of references.
    gc.collect()
    experiment = next(o.partition("=")[2] for o in plan.preset if o.startswith("experiment="))
    run(
        config,
        settings=settings,
        experiment=experiment,
        overrides=plan.overrides,
        skip_finished=True,
        signals=signals,
    )
    made = load_run(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe_run(made, list(PROBED), rows=100, device=device, steps=made.steps[-1:])
    store_record(folder / RECORD, measured(made, plan, spent()))
    # As everybody after this reads it, rounded.
    return Record.from_json(folder / RECORD)


class Campaign:
    """The runs of a finding within a time.

    jobs: runs at once, each a process of its own if more than one, on the GPUs in turn. seconds:
    none is begun that wouldn't be done by then, as far as is known; None: no limit. tell: of each
    run, a line.
    """

    def __init__(
        self,
        places: Places,
        *,
        jobs: int = 1,
        seconds: float | None = None,
        tell: Callable[[str], None] = print,
    ):
        self.places = places
        self.jobs = jobs
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.tell = tell
        self._took: list[float] = []

    def run(self, finding: Finding, plans: Sequence[Planned], budget: Budget) -> Missing:
        """Make the runs that are missing; failures don't stop the others."""
        found = [(plan, record_of(plan, self.places)) for plan in plans]
        for plan, record in found:
            if record is not None:
                self._keep(plan, record)
                self._took.append(record.seconds * self.jobs)
        todo = [plan for plan, record in found if record is None]
        done = len(plans) - len(todo)
        self.tell(f"{finding.name}: {len(plans)} runs, {done} done before")
        with StopSignals(requeues=False) as signals:
            if self.jobs == 1:
                return self._in_turn(finding, budget, todo, signals)
            return self._side_by_side(finding, budget, todo)

    def _is_over(self, budget: Budget) -> bool:
        """Whether a run that begins now would end too late: the time on a clock counts."""
        if self.deadline is None:
            return False
        expected = sum(self._took) / len(self._took) if self._took else budget.seconds
        return time.monotonic() + expected > self.deadline

    def _in_turn(
        self, finding: Finding, budget: Budget, todo: list[Planned], signals: StopSignals
    ) -> Missing:
        failed = []
        quiet()
        for index, plan in enumerate(todo):
            if self._is_over(budget):
                return Missing(todo[index:], failed)
            began = time.monotonic()
            try:
                with logged(log_path(plan, self.places)):
                    record = make(plan, self.places, signals)
            except UserError as error:
                failed.append(f"{plan.arm.name} seed {plan.seed}: {error}")
                self.tell(f"failed: {failed[-1]}")
                continue
            except Exception as error:
                # One arm's mistake, or a GPU out of memory, isn't the other runs'.
                told = f"{type(error).__name__}, see {log_path(plan, self.places)}"
                failed.append(f"{plan.arm.name} seed {plan.seed}: {told}")
                self.tell(f"failed: {failed[-1]}")
                continue
            self._finished(finding, plan, record, began)
        return Missing([], failed)

    def _side_by_side(self, finding: Finding, budget: Budget, todo: list[Planned]) -> Missing:
        waiting, failed = list(todo), []
        running: dict[subprocess.Popen, tuple[Planned, float, int]] = {}
        slots = list(reversed(range(self.jobs)))
        try:
            while running or (waiting and not self._is_over(budget)):
                while waiting and len(running) < self.jobs and not self._is_over(budget):
                    plan = waiting.pop(0)
                    slot = slots.pop()
                    process = self._start(finding, budget, plan, slot)
                    running[process] = plan, time.monotonic(), slot
                for process in [process for process in running if process.poll() is not None]:
                    plan, began, slot = running.pop(process)
                    slots.append(slot)
                    record = record_of(plan, self.places) if process.returncode == 0 else None
                    if record is None:
                        log = log_path(plan, self.places)
                        failed.append(f"{plan.arm.name} seed {plan.seed}: see {log}")
                        self.tell(f"failed: {failed[-1]}")
                    else:
                        self._finished(finding, plan, record, began)
                time.sleep(0.05)
        finally:
            # Ctrl-C and SIGTERM: each saves its state and ends.
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        return Missing(waiting, failed)

    def _start(
        self, finding: Finding, budget: Budget, plan: Planned, slot: int
    ) -> subprocess.Popen:
        command = [
            *(sys.executable, "-m", "scripts.reproduce", finding.name, "--budget", budget.name),
            *("--only", f"{plan.arm.name}:{plan.seed}", "--runs", str(self.places.runs)),
            *("--folder", str(self.places.stored), "--jobs", str(self.jobs)),
        ]
        for override in self.places.extra:
            command += ["--set", override]
        return start(command, log_path(plan, self.places), slot=slot, jobs=self.jobs)

    def _finished(self, finding: Finding, plan: Planned, record: Record, began: float) -> None:
        took = time.monotonic() - began
        self._took.append(took)
        self._keep(plan, record)
        told = ", ".join(
            f"{measure} {record.values[measure]:.3f}"
            for measure in ("natural/excess", "natural/rate_030", "canonical_loss")
            if measure in record.values
        )
        self.tell(f"{finding.name} {plan.arm.name} seed {plan.seed}: {took:.0f} s; {told}")

    def _keep(self, plan: Planned, record: Record) -> None:
        path = record_path(self.places.stored, plan)
        if self.places.store and not path.exists():
            store_record(path, record)


def make_only(
    finding: Finding, budget: Budget, arm: Arm, seed: int, places: Places, jobs: int
) -> None:
    """One run of a campaign of ``jobs`` at once, in the process that was started for it."""
    quiet()
    with StopSignals(requeues=False) as signals:
        make(planned(finding, budget, arm, seed, places.extra), places, signals, jobs=jobs)


def records(plans: Sequence[Planned], places: Places) -> list[tuple[Arm, Record]]:
    """Those that are done."""
    found = [(plan.arm, record_of(plan, places)) for plan in plans]
    return [(arm, record) for arm, record in found if record is not None]


def seeds_wanted(finding: Finding, budget: Budget, most: int | None) -> list[int]:
    """The seeds, at most so many."""
    return seeds_of(finding, budget)[:most]


def log_path(plan: Planned, places: Places) -> Path:
    """What a run printed lies beside its folder."""
    folder = run_dir(plan, places.runs)
    return folder.with_name(f"{folder.name}.log")
