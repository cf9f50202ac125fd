"""Records of runs on disk, and those of a finding together.

<folder>/runs/<pool>/<slug>.json    one a run, shared by all findings that have the arm
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from data.files import write_atomically
from kernels.errors import require
from train.findings.base import Arm, Finding, Of
from train.findings.budgets import Budget, Planned, pool_of
from train.findings.measures import Record

FOLDER = Path("docs/findings")
"""Where results of record lie, in the repository."""


def record_path(folder: Path, plan: Planned) -> Path:
    """Where the record of a run is stored."""
    return folder / "runs" / plan.pool / f"{plan.slug}.json"


def store_record(path: Path, record: Record) -> None:
    """Write it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, record.to_json())


class Results:
    """The records of a finding: ``records[arm][seed]``, arms in the finding's order."""

    def __init__(self, finding: Finding, budget: Budget, records: dict[str, dict[int, Record]]):
        self.finding = finding
        self.budget = budget
        self.records = records

    @property
    def runs(self) -> list[Record]:
        return [record for seeds in self.records.values() for record in seeds.values()]

    def with_measures(self, wanted: Iterable[Of]) -> Results:
        """Without the records that don't have what is wanted of their arm at all, not even as a
        value that isn't a number: they were made before it was taken."""
        of_arm: dict[str, set[str]] = {}
        for what in wanted:
            of_arm.setdefault(what.arm, set()).update(what.measures)
        records = {
            arm: {s: one for s, one in seeds.items() if of_arm.get(arm, set()) <= set(one.values)}
            for arm, seeds in self.records.items()
        }
        return Results(self.finding, self.budget, records)

    def other_data(self, arms: Iterable[str]) -> str:
        """Which arms that want the same text were trained on other text; empty if none were."""
        seen: dict[tuple[str, ...], dict[str, str]] = {}
        for arm in arms:
            for one in self.records.get(arm, {}).values():
                wanted = tuple(o for o in one.own if o.startswith("corpus."))
                seen.setdefault(wanted, {})[str(one.made_by.get("data_sha256"))] = arm
        for by_data in seen.values():
            if len(by_data) > 1:
                return f"runs that saw other data: of {', '.join(sorted(set(by_data.values())))}"
        return ""

    def lacks(self, what: Of) -> bool:
        """Whether a record of the arm was made before the measure was taken."""
        records = self.records[what.arm].values()
        return any(not set(what.measures) <= set(one.values) for one in records)

    def values(self, what: Of) -> dict[int, float]:
        """A measure of an arm by seed, nan where a run hasn't it."""
        first, *others = what.measures
        return {
            seed: one.values.get(first, math.nan)
            - sum(one.values.get(other, math.nan) for other in others)
            for seed, one in self.records.get(what.arm, {}).items()
        }

    def known(self, what: Of) -> list[float]:
        """Those that are numbers, by seed."""
        return [value for _, value in sorted(self.values(what).items()) if math.isfinite(value)]

    def curve(self, what: Of) -> pd.Series | None:
        """The mean over seeds by step of a measure that has a curve; None if it has none.

        Of written prompts: of the training rows, which have the same written into them.
        """
        name = what.measure.replace("written/rate_030_", "rows/mass_", 1)
        curves = []
        for one in self.records.get(what.arm, {}).values():
            natural = "bos_text/" if one.made_by.get("trained_with_bos") else "text/"
            column = name.replace("natural/", natural, 1)
            if column in one.curves:
                curves.append(one.curves.set_index("step")[column].dropna())
        if not curves:
            return None
        together = pd.concat(curves, axis=1, join="inner")
        return together.mean(axis=1) if len(together) else None

    def spread(self, what: Of) -> tuple[float, int] | None:
        """Standard deviation over seeds and how many there were; None for fewer than two."""
        values = self.known(what)
        return (float(np.std(values, ddof=1)), len(values)) if len(values) > 1 else None


def stored_results(finding: Finding, budget: Budget, folder: Path) -> Results:
    """All stored records of a finding's arms, of any seed; needs neither the runs nor their data.

    Of an arm whose context depends on the data, the stored runs tell it.
    """
    pool = folder / "runs" / pool_of(finding, budget)
    found: dict[str, dict[int, Record]] = {arm.name: {} for arm in finding.arms_of(budget.name)}
    stored = [Record.from_json(path) for path in sorted(pool.glob("*.json"))]
    for arm in finding.arms_of(budget.name):
        wanted = tuple(o for o in arm.overrides if o not in budget.implied)
        for record in stored:
            own = record.own
            if arm.context_of is not None:
                own = tuple(o for o in own if not o.startswith(CONTEXT))
                if own == record.own:
                    continue
            if own == wanted:
                found[arm.name][record.seed] = record
    ordered = {name: dict(sorted(seeds.items())) for name, seeds in found.items()}
    return Results(finding, budget, ordered)


CONTEXT = ("packing.context=", "packing.batch_tokens=")
"""Overrides of an arm whose context is cut to what another arm sees."""


def results_of(finding: Finding, budget: Budget, records: Iterable[tuple[Arm, Record]]) -> Results:
    """Results of records in hand."""
    found: dict[str, dict[int, Record]] = {arm.name: {} for arm in finding.arms_of(budget.name)}
    for arm, record in records:
        found[arm.name][record.seed] = record
    return Results(finding, budget, found)


def require_results(results: Results, folder: Path) -> None:
    """Raise ``UserError`` if nothing is stored."""
    name, budget = results.finding.name, results.budget.name
    rule = f"must have stored results of {name} at budget {budget}"
    require(bool(results.runs), str(folder), rule, "none")
