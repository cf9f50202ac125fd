"""Runs as the report sees them: what they measured, their arms, and means over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd

from data.packing import BosKind
from kernels.errors import require
from train.onset import HEAD_ALPHA, RunOnset, run_onset, scheduled_rates
from train.plotting import ARM_COLOURS
from train.runs import Run, arm_label, load_run

MOST_RECORDS = 400
"""Records of a curve that are drawn; more are thinned to about so many, log-spaced."""

NORM_PANELS: dict[str, tuple[str, Callable]] = {
    "norm_first/massive_ratio": ("hidden state, largest over layers", np.max),
    "norm_first/value_ratio": ("value, smallest over layers", np.min),
}
"""Metric by layer: what is drawn of it by arm, the layer where the first token stands out most."""

DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, eq=False)
class ReportRun:
    """A run with its tables read once.

    name: unique in the report. arm: index of its arm. metrics: ``Run.metrics()``. first: the rows
    of ``Run.sinks()`` about the first key over 64 queries, empty if there are none; onset is then
    None. probe_sets: hashes of the held-out text of its probes.
    """

    run: Run
    name: str
    arm: int
    metrics: pd.DataFrame
    first: pd.DataFrame
    onset: RunOnset | None
    probe_sets: tuple[str, ...]

    @property
    def seeds(self) -> str:
        """``seed`` and ``data_seed``, once if they are equal."""
        return "/".join(map(str, dict.fromkeys(self.run.seeds)))

    @property
    def is_proxy(self) -> bool:
        """Whether masses are shares of weights that no softmax made."""
        told = self.run.provenance.get("alpha_kind")
        return "proxy" in {told, *self.first["alpha_kind"].unique()}

    @property
    def knows_bos(self) -> bool:
        """Whether it was trained with a BOS."""
        return self.run.settings["packing"]["bos"] != BosKind.none.value

    def curve(self, name: str) -> pd.DataFrame:
        """The recorded values of a metric: columns step, tokens, value; empty if it has none."""
        if name not in self.metrics:
            return pd.DataFrame({"step": [], "tokens": [], "value": []})
        rows = self.metrics[["step", "tokens", name]].dropna()
        return rows.rename(columns={name: "value"}).reset_index(drop=True)

    def last(self, name: str) -> float:
        """The latest value of a metric, nan if it has none."""
        values = self.curve(name)["value"]
        return float(values.iloc[-1]) if len(values) else float("nan")

    def sink_heads(self) -> tuple[int, int] | None:
        """In the last record, the heads whose mean alpha is above 0.3, and all heads; None without
        records."""
        if self.first.empty:
            return None
        last = self.first[self.first["step"] == self.first["step"].max()]
        return int((last["alpha"] > HEAD_ALPHA).sum()), len(last)

    def bos_removal_loss(self) -> float:
        """Loss without BOS minus loss with it on the same labels, nats a label; nan if unknown."""
        return self.last("probe/t64_text/loss") - self.last("probe/t64_bos_text/loss")


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in nothing but seeds, in the order given."""

    index: int
    label: str
    runs: tuple[ReportRun, ...]

    @property
    def is_proxy(self) -> bool:
        return any(run.is_proxy for run in self.runs)

    @property
    def name(self) -> str:
        """The label, marked if masses are proxies, which aren't to be compared with others."""
        return f"{self.label} (proxy)" if self.is_proxy else self.label

    @property
    def colour(self) -> str:
        """The arm's colour, the same everywhere; arms past the palette's end share colours."""
        return ARM_COLOURS[self.index % len(ARM_COLOURS)]

    @property
    def dash(self) -> str:
        """The line style that tells arms of one colour apart, as plotly names it."""
        return DASHES[self.index // len(ARM_COLOURS) % len(DASHES)]

    @property
    def knows_bos(self) -> bool:
        return all(run.knows_bos for run in self.runs)

    def curve(self, name: str) -> pd.DataFrame:
        """Over the steps that all runs of the arm recorded: columns step, tokens, mean, low, high
        (the smallest and the largest run). Runs without the metric are left out."""
        return mean_and_range([run.curve(name) for run in self.runs])

    def last(self, name: str) -> list[float]:
        """The latest value of each run."""
        return [run.last(name) for run in self.runs]

    def mass_against_loss(self) -> pd.DataFrame:
        """One row a run that has both: name, loss (canonical), mass, baseline."""
        rows = [
            {
                "name": run.name,
                "loss": run.last("val/canonical_loss"),
                "mass": run.last("sink/mass"),
                "baseline": run.last("sink/baseline"),
            }
            for run in self.runs
        ]
        return pd.DataFrame(rows).dropna(subset=["loss", "mass"])


def mean_and_range(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean, smallest and largest value over curves at the steps that they all have.

    curves: columns step, tokens, value. Gives step, tokens, mean, low, high. Curves without rows
    are left out, and no curve at all gives no rows.
    """
    by_step = [curve.set_index("step") for curve in curves if len(curve)]
    if not by_step:
        return pd.DataFrame({"step": [], "tokens": [], "mean": [], "low": [], "high": []})
    steps = reduce(pd.Index.intersection, (curve.index for curve in by_step)).sort_values()
    values = np.array([curve.loc[steps, "value"].to_numpy() for curve in by_step])
    return pd.DataFrame(
        {
            "step": steps.to_numpy(dtype=int),
            "tokens": by_step[0].loc[steps, "tokens"].to_numpy(dtype=int),
            "mean": values.mean(0),
            "low": values.min(0),
            "high": values.max(0),
        }
    )


def over_layers(metrics: pd.DataFrame, prefix: str, over: Callable) -> pd.DataFrame:
    """``over`` (max, min) of a metric's layers at each record: columns step, tokens, value."""
    names = [name for name in metrics if name.startswith(f"{prefix}/layer_")]
    if not names:
        return pd.DataFrame({"step": [], "tokens": [], "value": []})
    rows = metrics[["step", "tokens", *names]].dropna()
    return rows[["step", "tokens"]].assign(value=over(rows[names].to_numpy(), axis=1))


def log_spaced(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the recorded steps, evenly over their logarithm, first and last included;
    all of them if they aren't more."""
    steps_S = np.unique(np.asarray(steps, dtype=int))
    if len(steps_S) <= most:
        return steps_S.tolist()
    logs_S = np.log(np.maximum(1, steps_S))
    wanted = np.linspace(logs_S[0], logs_S[-1], most)
    nearest = np.abs(logs_S[None] - wanted[:, None]).argmin(1)
    return steps_S[np.unique(nearest)].tolist()


def thinned(curve: pd.DataFrame, most: int = MOST_RECORDS) -> pd.DataFrame:
    """The curve at the steps of ``log_spaced``, without step 0, which has no logarithm."""
    curve = curve[curve["step"] > 0]
    return curve[curve["step"].isin(log_spaced(curve["step"], most))]


def gather(paths: Sequence[Path | str]) -> tuple[list[ReportRun], list[Arm]]:
    """Read runs, once each however often they are named, and sort them into arms.

    Raises ``UserError`` for no run at all, and for a path that is no run folder.
    """
    require(len(paths) > 0, "RUN", "must name at least one run folder", "none")
    loaded = {Path(path).resolve(): Path(path) for path in paths}
    found = [load_run(path) for path in loaded.values()]
    labels = arm_label(found)
    arms = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    names = [run.name for run in found]
    runs = []
    for run in found:
        metrics, sinks, probes = run.metrics(), run.sinks(), run.probes()
        first = sinks[sinks["key"] == "first"].reset_index(drop=True)
        runs.append(
            ReportRun(
                run=run,
                # Folders of one name are told apart by their paths.
                name=run.name if names.count(run.name) == 1 else str(run.path),
                arm=arms[labels[run.path]],
                metrics=metrics,
                first=first,
                onset=_onset(run, first),
                probe_sets=tuple(sorted(map(str, probes["probe_set"].dropna().unique()))),
            )
        )
    return runs, [
        Arm(index, label, tuple(run for run in runs if run.arm == index))
        for label, index in arms.items()
    ]


def _onset(run: Run, first: pd.DataFrame) -> RunOnset | None:
    if first.empty:
        return None
    return run_onset(first, scheduled_rates(run.config, int(first["step"].max())))


def proxy_mark(arms: Sequence[Arm]) -> str:
    """Said on an axis where proxies stand beside probabilities."""
    return " (proxy where marked)" if any(arm.is_proxy for arm in arms) else ""
