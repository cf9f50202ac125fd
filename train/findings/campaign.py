"""Making a finding's runs: what is missing, one after the other or several at once.

A run is trained, its last step probed, and its record written into its folder, then, if wanted,
among the stored ones. What has a record isn't run again, whichever finding it was made for; what
was stopped goes on from its state. Seeds come first in the order: when time is up, whole pairs are
there.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.errors import UserError
from train.config import compose
from train.findings.base import Arm, Finding
from train.findings.budgets import Budget, Planned, difference, planned, run_dir, seeds_of
from train.findings.measures import PROBED, Record, measured
from train.findings.store import record_path, store_record
from train.launch import quiet
from train.probes.of_runs import probe_run
from train.run import run
from train.runs import load_run
from train.stopping import StopSignals

RECORD = "record.json"
"""The record in a run's folder."""


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


def make(plan: Planned, places: Places, signals: StopSignals) -> Record:
    """Train (or finish), probe and record one run.

    Raises ``UserError`` as a run does, and what a signal raises once the state is saved.
    """
    folder = run_dir(plan, places.runs)
    config, settings = plan.compose((*places.extra, f"run_dir='{folder}'", "resume=true"))
    began = time.perf_counter()
    # A compiler that remembers the models of all runs before gives up on compiling.
    torch.compiler.reset()
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
    seconds = time.perf_counter() - began
    path = folder / RECORD
    store_record(path, measured(made, plan, seconds))
    # As everybody after this reads it, rounded.
    return Record.from_json(path)


class Campaign:
    """The runs of a finding within a time.

    jobs: runs at once, each a process of its own if more than one. seconds: none is begun that
    wouldn't be done by then, as far as is known; None: no limit. tell: of each run, a line.
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
                self._took.append(record.seconds / self.jobs)
        todo = [plan for plan, record in found if record is None]
        done = len(plans) - len(todo)
        self.tell(f"{finding.name}: {len(plans)} runs, {done} done before")
        with StopSignals(requeues=False) as signals:
            if self.jobs == 1:
                return self._in_turn(finding, todo, signals)
            return self._side_by_side(finding, budget, todo)

    def _is_over(self) -> bool:
        if self.deadline is None:
            return False
        expected = sum(self._took) / len(self._took) if self._took else 0.0
        return time.monotonic() + expected > self.deadline

    def _in_turn(self, finding: Finding, todo: list[Planned], signals: StopSignals) -> Missing:
        failed = []
        quiet()
        for index, plan in enumerate(todo):
            if self._is_over():
                return Missing(todo[index:], failed)
            began = time.monotonic()
            try:
                with logged(plan, self.places):
                    record = make(plan, self.places, signals)
            except UserError as error:
                failed.append(f"{plan.arm.name} seed {plan.seed}: {error}")
                self.tell(f"failed: {failed[-1]}")
                continue
            self._finished(finding, plan, record, began)
        return Missing([], failed)

    def _side_by_side(self, finding: Finding, budget: Budget, todo: list[Planned]) -> Missing:
        waiting, failed = list(todo), []
        running: dict[subprocess.Popen, tuple[Planned, float]] = {}
        try:
            while running or (waiting and not self._is_over()):
                while waiting and len(running) < self.jobs and not self._is_over():
                    plan = waiting.pop(0)
                    running[self._start(finding, budget, plan)] = plan, time.monotonic()
                for process in [process for process in running if process.poll() is not None]:
                    plan, began = running.pop(process)
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

    def _start(self, finding: Finding, budget: Budget, plan: Planned) -> subprocess.Popen:
        log = log_path(plan, self.places)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "scripts.reproduce", finding.name, "--budget", budget.name),
            *("--only", f"{plan.arm.name}:{plan.seed}", "--runs", str(self.places.runs)),
            *("--folder", str(self.places.stored)),
        ]
        for override in self.places.extra:
            command += ["--set", override]
        with log.open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def _finished(self, finding: Finding, plan: Planned, record: Record, began: float) -> None:
        took = time.monotonic() - began
        self._took.append(took / self.jobs)
        self._keep(plan, record)
        values = record.values
        figures = [
            f"{name} {values[measure]:.3f}"
            for name, measure in (
                ("excess", "natural/excess"),
                ("rate", "natural/rate_030"),
                ("canonical loss", "canonical_loss"),
            )
            if measure in values
        ]
        told = ", ".join(figures)
        self.tell(f"{finding.name} {plan.arm.name} seed {plan.seed}: {took:.0f} s; {told}")

    def _keep(self, plan: Planned, record: Record) -> None:
        path = record_path(self.places.stored, plan)
        if self.places.store and not path.exists():
            store_record(path, record)


def make_only(finding: Finding, budget: Budget, arm: Arm, seed: int, places: Places) -> None:
    """One run of a campaign, in the process that was started for it."""
    quiet()
    with StopSignals(requeues=False) as signals:
        make(planned(finding, budget, arm, seed, places.extra), places, signals)


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


@contextlib.contextmanager
def logged(plan: Planned, places: Places):
    """What is printed in here goes to the run's log."""
    path = log_path(plan, places)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, contextlib.redirect_stdout(file):
        yield
