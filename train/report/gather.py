"""Runs as the report sees them: what they measured, their arms, and means over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data.packing import BosKind
from kernels.errors import require
from train.arms import arm_label, short_arm_label
from train.onset import HEAD_ALPHA, RunOnset, run_onset, scheduled_rates
from train.plotting import ARM_COLOURS
from train.report.curves import common_steps, mean_and_range, short_count
from train.runs import Run, load_run

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
    None. kept: probes of the whole model at kept checkpoints, a row a step, columns step, tokens,
    ``kept/<probe>/<input>/<name>``. probe_sets: hashes of the held-out text of its probes.
    """

    run: Run
    name: str
    arm: int
    metrics: pd.DataFrame
    first: pd.DataFrame
    onset: RunOnset | None
    kept: pd.DataFrame
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

    @property
    def last_step(self) -> int:
        """The last step with a row of metrics, 0 before there is one."""
        return int(self.metrics["step"].max()) if len(self.metrics) else 0

    def curve(self, name: str) -> pd.DataFrame:
        """The values of a metric or of ``kept``: columns step, tokens, value; empty if it has
        none."""
        table = self.kept if name in self.kept else self.metrics
        if name not in table:
            return pd.DataFrame({"step": [], "tokens": [], "value": []})
        rows = table[["step", "tokens", name]].dropna()
        return rows.rename(columns={name: "value"}).reset_index(drop=True)

    def sink_heads(self, until: int | None = None) -> tuple[int, int] | None:
        """In the last record, up to the step ``until`` if given: the heads whose mean alpha is
        above 0.3, and all heads. None without records."""
        first = self.first if until is None else self.first[self.first["step"] <= until]
        if first.empty:
            return None
        last = first[first["step"] == first["step"].max()]
        return int((last["alpha"] > HEAD_ALPHA).sum()), len(last)


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in nothing but seeds, in the order given.

    label: all settings in which the arms differ; short: some that tell them apart.
    """

    index: int
    label: str
    short: str
    runs: tuple[ReportRun, ...]

    @property
    def is_proxy(self) -> bool:
        return any(run.is_proxy for run in self.runs)

    @property
    def name(self) -> str:
        """The label, marked if masses are proxies, which aren't to be compared with others."""
        return self._marked(self.label)

    def _marked(self, label: str) -> str:
        return f"{label} (proxy)" if self.is_proxy else label

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

    @property
    def until(self) -> int:
        """The last step that all runs with any metrics have reached. What is compared lies no
        later: a seed that is behind isn't averaged with what others became since."""
        return min((run.last_step for run in self.runs if len(run.metrics)), default=0)

    @property
    def behind(self) -> list[str]:
        """Of each run that hasn't reached its last step yet: ``seed 1 at 0.5M of 3M tokens``."""
        furthest = max(run.last_step for run in self.runs)
        told = []
        for run in self.runs:
            planned = max(furthest, run.run.config.trainer.max_steps)
            if run.last_step < planned:
                each = run.run.tokens_per_step
                done = f"{short_count(run.last_step * each)} of {short_count(planned * each)}"
                told.append(f"seed {run.seeds} at {done} tokens")
        return told

    @property
    def legend(self) -> str:
        """The short label, marked as the name is, and which runs are ``behind``."""
        return ", ".join([self._marked(self.short), *self.behind])

    @property
    def whole_legend(self) -> str:
        """The same with the whole label."""
        return ", ".join([self.name, *self.behind])

    def curve(self, name: str) -> pd.DataFrame:
        """Over the steps that all runs of the arm recorded: columns step, tokens, mean, low, high
        (the smallest and the largest run). Runs without the metric are left out."""
        return mean_and_range([run.curve(name) for run in self.runs])

    def last(self, name: str) -> list[float]:
        """Each run's value of a metric at the last step up to ``until`` at which all runs with the
        metric have one; nan for runs without."""
        curves = [run.curve(name).set_index("step")["value"] for run in self.runs]
        steps = common_steps([curve.index for curve in curves if len(curve)])
        steps = steps[steps <= self.until]
        if not len(steps):
            return [math.nan] * len(curves)
        return [float(curve[steps[-1]]) if len(curve) else math.nan for curve in curves]

    def bos_removal_loss(self) -> list[float]:
        """Of each run, loss without BOS minus loss with it on the same labels, nats a label."""
        without, with_bos = (self.last(f"probe/t64_{name}/loss") for name in ("text", "bos_text"))
        return np.subtract(without, with_bos).tolist()

    def cost_of_hiding(self) -> list[float]:
        """Of each run, at a kept checkpoint, what hiding position 0 from later queries adds to the
        loss on prompts that begin as its training rows do, nats a label (``probes.losses``)."""
        natural = "bos_text" if self.knows_bos else "text"
        return self.last(f"kept/losses/{natural}/cost_hidden_first")

    def mass_against_loss(self) -> pd.DataFrame:
        """One row a run that has both: name, loss (canonical), mass, baseline; of ``last``."""
        columns = {
            "loss": self.last("val/canonical_loss"),
            "mass": self.last("sink/mass"),
            "baseline": self.last("sink/baseline"),
        }
        table = pd.DataFrame({"name": [run.name for run in self.runs], **columns})
        return table.dropna(subset=["loss", "mass"])


def gather(paths: Sequence[Path | str]) -> tuple[list[ReportRun], list[Arm]]:
    """Read runs, once each however often they are named, and sort them into arms.

    Raises ``UserError`` for no run at all, and for a path that is no run folder.
    """
    require(len(paths) > 0, "RUN", "must name at least one run folder", "none")
    loaded = {Path(path).resolve(): Path(path) for path in paths}
    found = [load_run(path) for path in loaded.values()]
    labels, short = arm_label(found), short_arm_label(found)
    arms = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    names = [run.name for run in found]
    runs = []
    for run in found:
        # A kill and a resume may have left a row twice; the later one is the run's.
        metrics = run.metrics().drop_duplicates("step", keep="last")
        sinks, probes = run.sinks(), run.probes()
        first = sinks[sinks["key"] == "first"]
        first = first.drop_duplicates(["step", "layer", "head"], keep="last")
        first = first.reset_index(drop=True)
        runs.append(
            ReportRun(
                run=run,
                # Folders of one name are told apart by their paths.
                name=run.name if names.count(run.name) == 1 else str(run.path),
                arm=arms[labels[run.path]],
                metrics=metrics,
                first=first,
                onset=_onset(run, first),
                kept=_model_wide(probes),
                probe_sets=tuple(sorted(map(str, probes["probe_set"].dropna().unique()))),
            )
        )
    by_label = {labels[path]: short[path] for path in labels}
    return runs, [
        Arm(index, label, by_label[label], tuple(run for run in runs if run.arm == index))
        for label, index in arms.items()
    ]


def _model_wide(probes: pd.DataFrame) -> pd.DataFrame:
    """What ``Run.probes()`` says of the whole model: columns step, tokens, and one a finding."""
    # What is said of key 0 has its position, other findings have none.
    wide = probes[(probes["layer"] == -1) & (probes["head"] == -1) & (probes["position"] <= 0)]
    wide = wide.assign(key="kept/" + wide["probe"] + "/" + wide["input"] + "/" + wide["name"])
    wide = wide.drop_duplicates(["step", "key"], keep="last")
    table = wide.pivot(index=["step", "tokens"], columns="key", values="value")
    return table.reset_index().rename_axis(columns=None)


def _onset(run: Run, first: pd.DataFrame) -> RunOnset | None:
    if first.empty:
        return None
    return run_onset(first, scheduled_rates(run.config, int(first["step"].max())))


def proxy_mark(arms: Sequence[Arm]) -> str:
    """Said on an axis where proxies stand beside probabilities."""
    return " (proxy where marked)" if any(arm.is_proxy for arm in arms) else ""
