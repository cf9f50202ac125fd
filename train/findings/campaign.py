"""Making a finding's runs: what is missing, one after the other or several at once.

A run is trained, its last step probed, and its record written into its folder, then, if wanted,
among the stored ones. What has a record isn't run again, whichever finding it was made for; what
was stopped goes on from its state. Seeds come first in the order: when time is up, whole pairs are
there, but for runs too long for what was left of it.
"""

from __future__ import annotations

import functools
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from data.files import exclusive_lock, write_atomically
from kernels.errors import UserError
from train.config import compose
from train.data import data_of
from train.findings.base import Arm, Finding
from train.findings.budgets import (
    Budget,
    Planned,
    difference,
    planned,
    run_dir,
    seeds_of,
    tokens_of,
)
from train.findings.jobs import logged, start, why_failed
from train.findings.measures import PROBED, Record, measured
from train.findings.pace import NO_SLOWER, Pace, Size
from train.findings.store import record_path, store_record
from train.gpus import visible_gpus
from train.launch import quiet
from train.probes.of_runs import probe_run
from train.run import run
from train.run_folder import RunFolder
from train.runs import load_run
from train.stopping import StopSignals

RECORD = "record.json"
"""The record in a run's folder."""

TOLD = {
    "natural/excess": "excess mass",
    "natural/rate_030": "rate",
    "canonical_loss": "canonical loss",
}
"""Measures in the line that tells of a run, by the name there: of prompts as it was trained."""

SPENT = "spent_seconds"
"""In a run's folder, what its starts that were stopped cost, and what of the device they had."""


class Places(NamedTuple):
    """Where things lie. runs: run folders. stored: of records, read and, if ``store``, written.
    extra: overrides of every run that say where its data lie, as ``corpus.paths``."""

    runs: Path
    stored: Path
    store: bool
    extra: tuple[str, ...] = ()


class Task(NamedTuple):
    """A run, and the finding that asks for it."""

    finding: Finding
    plan: Planned


class Running(NamedTuple):
    """A run in a process of its own. slot: one of those of the campaign's jobs. written: bytes of
    its log that earlier starts wrote."""

    task: Task
    slot: int
    log: Path
    written: int


class Missing(NamedTuple):
    """What a campaign left undone: runs not begun, and what failed."""

    waiting: list[Planned]
    failed: list[str]


def tasks_of(
    finding: Finding, budget: Budget, seeds: Sequence[int], extra: tuple[str, ...]
) -> list[Task]:
    """Every run, seed by seed."""
    return [
        Task(finding, planned(finding, budget, arm, seed, extra))
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
                _, had = _spent_before(folder)
                had += (time.perf_counter() - began) / max(jobs, NO_SLOWER)
                told = f"{_spent(folder, began, jobs)} {had}"
                write_atomically(folder / SPENT, told.encode())
            raise


def _spent(folder: Path, began: float, jobs: int) -> float:
    """Seconds of the device that a run has cost, in all its starts."""
    return _spent_before(folder)[0] + (time.perf_counter() - began) / jobs


def _spent_before(folder: Path) -> tuple[float, float]:
    """Of starts that were stopped: what they cost, and what they had as ``pace`` counts it."""
    path = folder / SPENT
    cost, had = path.read_text().split() if path.exists() else ("0", "0")
    return float(cost), float(had)


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
    """Runs of one finding or several within a time, as one queue.

    jobs: runs at once, each a process of its own if more than one, on the GPUs in turn. seconds:
    none is begun if it or one beside it wouldn't be done by then, as far as is known, so that
    towards the end fewer share a GPU (``train.findings.pace``); None: no limit. tell: of each run,
    a line.
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
        devices = max(1, len(visible_gpus()))
        # Of these, how many share a GPU.
        self.share = math.ceil(jobs / devices)
        deadline = None if seconds is None else time.monotonic() + seconds
        self.pace = Pace(jobs, devices, deadline)
        self.tell = tell
        self._has_data = False

    def run(self, tasks: Sequence[Task], budget: Budget) -> Missing:
        """Make the runs that are missing, in their order; failures don't stop the others.

        An arm that several findings have is run once, for the first of them. Raises ``UserError``
        for stored runs of other settings, and, with several jobs, for data that can't be used.
        """
        once: dict[Path, Task] = {}
        for task in tasks:
            once.setdefault(run_dir(task.plan, self.places.runs), task)
        found = [(task, record_of(task.plan, self.places)) for task in once.values()]
        for task, record in found:
            if record is not None:
                self._keep(task.plan, record)
        todo = [task for task, record in found if record is None]
        names = ", ".join(dict.fromkeys(task.finding.name for task in tasks))
        self.tell(f"{names}: {len(found)} runs, {len(found) - len(todo)} done before")
        with StopSignals(requeues=False) as signals:
            if self.jobs == 1:
                return self._in_turn(budget, todo, signals)
            return self._side_by_side(budget, todo)

    def _next(self, waiting: list[Task], budget: Budget) -> tuple[Task, int] | None:
        """The first of those that wait that would be done in time, and the slot in which it begins
        now; None if none would."""
        for task in waiting:
            size = self._size(task.plan, budget)
            for slot in self.pace.slots():
                if not self.pace.in_time(slot, size):
                    continue
                if self.jobs > 1 and not self._has_data:
                    # Here once, rather than by whoever comes first while all others wait; and data
                    # that can't be used end the campaign before it begins.
                    config, _ = task.plan.compose(self.places.extra)
                    data_of(config).setup()
                    self._has_data = True
                    # Which takes time.
                    return self._next(waiting, budget)
                waiting.remove(task)
                self.pace.begin(slot, size)
                return task, slot
        return None

    def _size(self, plan: Planned, budget: Budget) -> Size:
        tokens = _tokens(plan)
        alone = budget.seconds * tokens / tokens_of(plan.preset)
        _, before = _spent_before(run_dir(plan, self.places.runs))
        return Size(plan.pool, tokens, alone, before)

    def _in_turn(self, budget: Budget, waiting: list[Task], signals: StopSignals) -> Missing:
        failed = []
        quiet()
        while (begun := self._next(waiting, budget)) is not None:
            task, slot = begun
            record, log = None, log_path(task.plan, self.places)
            try:
                with logged(log):
                    record = make(task.plan, self.places, signals)
            except UserError as error:
                why = str(error)
            except Exception as error:
                # One arm's mistake, or a GPU out of memory, isn't the other runs'.
                why = f"{type(error).__name__}, see {log}"
            self._ended(task, slot, record)
            if record is None:
                failed.append(self._failed(task, why))
        return Missing([task.plan for task in waiting], failed)

    def _side_by_side(self, budget: Budget, waiting: list[Task]) -> Missing:
        failed: list[str] = []
        running: dict[subprocess.Popen, Running] = {}
        try:
            while True:
                # What isn't in time now is even less so before another run has ended.
                while self.pace.free and (begun := self._next(waiting, budget)):
                    task, slot = begun
                    log = log_path(task.plan, self.places)
                    written = log.stat().st_size if log.exists() else 0
                    running[self._start(task, budget, slot)] = Running(task, slot, log, written)
                if not running:
                    break
                while not (over := [process for process in running if process.poll() is not None]):
                    time.sleep(0.05)
                for process in over:
                    done, record = running.pop(process), None
                    if process.returncode == 0:
                        record = record_of(done.task.plan, self.places)
                    self._ended(done.task, done.slot, record)
                    if record is None:
                        why = why_failed(done.log, done.written)
                        failed.append(self._failed(done.task, why))
        finally:
            # Ctrl-C and SIGTERM: each saves its state and ends.
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        return Missing([task.plan for task in waiting], failed)

    def _start(self, task: Task, budget: Budget, slot: int) -> subprocess.Popen:
        finding, plan = task
        command = [
            *(sys.executable, "-m", "scripts.reproduce", finding.name, "--budget", budget.name),
            *("--only", f"{plan.arm.name}:{plan.seed}", "--runs", str(self.places.runs)),
            *("--folder", str(self.places.stored), "--jobs", str(self.share)),
        ]
        for override in self.places.extra:
            command += ["--set", override]
        return start(command, log_path(plan, self.places), slot=slot, jobs=self.jobs)

    def _failed(self, task: Task, why: str) -> str:
        told = f"{task.finding.name} {task.plan.arm.name} seed {task.plan.seed}: {why}"
        self.tell(f"failed: {told}")
        return told

    def _ended(self, task: Task, slot: int, record: Record | None) -> None:
        """The run in a slot is over; record: None if it failed."""
        (finding, plan), turn = task, self.pace.end(slot)
        if record is None:
            return
        folder = run_dir(plan, self.places.runs)
        before, _ = _spent_before(folder)
        # Not of what an earlier start began, or another campaign made while this one waited.
        if before == 0 and turn.cost >= record.seconds / 2:
            self.pace.learn(turn)
        if self.jobs > 1:
            # The run itself doesn't know how many there were beside it.
            seconds = round(max(record.seconds, before + turn.cost), 1)
            record = replace(record, seconds=seconds)
            store_record(folder / RECORD, record)
        self._keep(plan, record)
        told = ", ".join(
            f"{title} {record.values[measure]:.3f}"
            for measure, title in TOLD.items()
            if measure in record.values
        )
        self.tell(f"{finding.name} {plan.arm.name} seed {plan.seed}: {turn.clock:.0f} s; {told}")

    def _keep(self, plan: Planned, record: Record) -> None:
        path = record_path(self.places.stored, plan)
        if self.places.store and not path.exists():
            store_record(path, record)


def _tokens(plan: Planned) -> int:
    """That the run trains on."""
    return tokens_of(plan.preset, plan.own)


def make_only(
    finding: Finding, budget: Budget, arm: Arm, seed: int, places: Places, jobs: int
) -> None:
    """One run of a campaign of ``jobs`` at once, in the process that was started for it."""
    quiet()
    with StopSignals(requeues=False) as signals:
        make(planned(finding, budget, arm, seed, places.extra), places, signals, jobs=jobs)


def records(tasks: Sequence[Task], places: Places) -> list[tuple[Arm, Record]]:
    """Those that are done."""
    found = [(task.plan.arm, record_of(task.plan, places)) for task in tasks]
    return [(arm, record) for arm, record in found if record is not None]


def seeds_wanted(finding: Finding, budget: Budget, most: int | None) -> list[int]:
    """The seeds, at most so many."""
    return seeds_of(finding, budget)[:most]


def log_path(plan: Planned, places: Places) -> Path:
    """What a run printed lies beside its folder."""
    folder = run_dir(plan, places.runs)
    return folder.with_name(f"{folder.name}.log")
