"""A finding's figure, a panel for each that it has at the budget, and the data behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.findings.base import Of, Panel
from train.findings.measures import Record
from train.findings.store import Results
from train.plotting import ARM_COLOURS, BASELINE, layer_colours, log_steps, new_figure

LINES = ("-", "--", ":", "-.")
"""Styles that tell arms of one colour apart."""

MARKERS = ("o", "D")
"""Of the first and the second measure of a panel of points."""

SIDE_BY_SIDE = 3
"""More panels than that are in two rows."""

INCHES_AN_ARM = 0.34
"""In a panel of points: its label, and a line of markers for each of two measures."""

COLUMNS = ("panel", "kind", "measure", "arm", "seed", "layer", "step", "value")
"""Of the figure's data; seed -1 is the mean over seeds, layer and step -1 are not of one."""


def draw(results: Results) -> Figure:
    """The figure; panels without data are empty and say so."""
    panels = results.finding.panels_of(results.budget.name)
    points = points_of(results)
    rows = 1 if len(panels) <= SIDE_BY_SIDE else 2
    columns = math.ceil(len(panels) / rows)
    height = max(3.6, INCHES_AN_ARM * len(results.records) + 1.6)
    figure, axes = new_figure(5.6 * columns, height * rows, len(panels), columns)
    for index, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
        own = points[points["panel"] == index]
        axis.set_title(panel.title)
        if own.empty:
            axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)
            continue
        {"points": _points, "curves": _curves, "layers": _layers}[panel.kind](axis, panel, own)
        shown = _shown(results, panel).values()
        kinds = {run.made_by["alpha_kind"] for seeds in shown for run in seeds.values()}
        if "proxy" in kinds and not _is_ratio(panel):
            axis.set_title(f"{panel.title} (sigmoid: proxy)")
    _share_values(panels, axes)
    if not results.budget.decides:
        figure.suptitle(f"budget {results.budget.name}: a check of the machinery", fontsize=9)
    return figure


def _share_values(panels: Sequence[Panel], axes: Iterable[Axes]) -> None:
    """Panels of points that measure the same have the same limits; curves have a panel each for
    what is of different sizes."""
    alike: dict[str, list[Axes]] = {}
    for panel, axis in zip(panels, axes, strict=True):
        # One without data has none, and limits of its own.
        if panel.kind == "points" and axis.collections:
            alike.setdefault(panel.label, []).append(axis)
    for group in alike.values():
        ends = [axis.get_xlim() for axis in group]
        for axis in group:
            axis.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))


def points_of(results: Results) -> pd.DataFrame:
    """Everything that is drawn, columns ``COLUMNS``."""
    rows = []
    for index, panel in enumerate(results.finding.panels_of(results.budget.name)):
        rows += [(index, panel.kind, *point) for point in _FOUND[panel.kind](results, panel)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"value": float}).dropna(subset="value").reset_index(drop=True)


def _shown(results: Results, panel: Panel) -> dict[str, dict[int, Record]]:
    """Its arms' runs, by arm and seed."""
    arms = panel.arms or tuple(results.records)
    return {arm: results.records[arm] for arm in arms}


def _found_points(results: Results, panel: Panel) -> list[tuple]:
    return [
        (measure, arm, seed, -1, -1, value)
        for measure in panel.measures
        for arm in _shown(results, panel)
        for seed, value in results.values(Of(arm, measure)).items()
    ]


def _found_curves(results: Results, panel: Panel) -> list[tuple]:
    (measure,) = panel.measures
    return [
        (measure, arm, seed, -1, step, value)
        for arm, seeds in _shown(results, panel).items()
        for seed, record in seeds.items()
        if measure in record.curves
        for step, value in record.curves[["step", measure]].itertuples(index=False)
    ]


def _found_layers(results: Results, panel: Panel) -> list[tuple]:
    (measure,), (arm,) = panel.measures, panel.arms
    prefix = f"{measure}/layer_"
    names = sorted(
        {
            name
            for record in results.records[arm].values()
            for name in record.curves
            if name.startswith(prefix)
        }
    )
    rows = []
    for name in names:
        curve = results.curve(Of(arm, name))
        if curve is not None:
            layer = int(name.removeprefix(prefix))
            rows += [(measure, arm, -1, layer, step, value) for step, value in curve.items()]
    return rows


_FOUND = {"points": _found_points, "curves": _found_curves, "layers": _found_layers}


def _points(axis: Axes, panel: Panel, points: pd.DataFrame) -> None:
    arms = list(dict.fromkeys(points["arm"]))
    spread = 0.16 if len(panel.measures) > 1 else 0.0
    for index, measure in enumerate(panel.measures):
        own = points[points["measure"] == measure]
        if own.empty:
            continue
        shift = spread * (2 * index - 1)
        y = np.array([arms.index(arm) for arm in own["arm"]]) + shift
        colour = ARM_COLOURS[index]
        style = {"s": 26, "marker": MARKERS[index], "color": colour, "alpha": 0.75, "zorder": 3}
        label = _name(measure) if len(panel.measures) > 1 else None
        axis.scatter(own["value"], y, label=label, **style)
        for arm, mean in own.groupby("arm")["value"].mean().items():
            at = arms.index(arm) + shift
            axis.plot([mean, mean], [at - 0.13, at + 0.13], color=colour, lw=1.8)
    if _is_ratio(panel):
        axis.axvline(1, label="as others", **BASELINE)
    elif panel.measures[0].endswith("excess"):
        axis.axvline(0, label="uniform attention", **BASELINE)
    elif " - " in panel.measures[0]:
        axis.axvline(0, label="no difference", **BASELINE)
    elif "rate" in panel.measures[0]:
        # Of a share none is what all are compared with.
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_xlabel(panel.label)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8)


def _is_ratio(panel: Panel) -> bool:
    """Of norms, the first token's over the others'."""
    return panel.measures[0].endswith("_ratio")


def _name(measure: str) -> str:
    known = {
        "bos_text/excess": "BOS + text",
        "text/excess": "text",
        "natural/rate_030": "first token",
        "natural/null_rate_030": "slot",
        "natural/excess": "first token",
        "natural/null_excess": "slot",
        "bos_text/loss - text/loss": "as it is",
        "text/cost_noise": "noise for its embedding",
    }
    if "_at_" in measure:
        return f"position {int(measure[-1]) + 1}"
    return "largest of the others" if "_beside_" in measure else known.get(measure, measure)


def _curves(axis: Axes, panel: Panel, points: pd.DataFrame) -> None:
    drawn = points[points["step"] > 0]
    for index, arm in enumerate(dict.fromkeys(drawn["arm"])):
        by_step = drawn[drawn["arm"] == arm].groupby("step")["value"]
        # Only where every seed of the arm has a record.
        whole = by_step.count() == by_step.count().max()
        mean, low, high = (
            values[whole] for values in (by_step.mean(), by_step.min(), by_step.max())
        )
        colour = ARM_COLOURS[index % len(ARM_COLOURS)]
        style = LINES[index // len(ARM_COLOURS) % len(LINES)]
        axis.plot(mean.index, mean, color=colour, linestyle=style, label=arm)
        axis.fill_between(mean.index, low, high, color=colour, alpha=0.14, lw=0)
    axis.axhline(0, label="uniform attention", **BASELINE)
    log_steps(axis, drawn["step"])
    axis.set_ylabel(panel.label)
    axis.legend(frameon=False, fontsize=8)


def _layers(axis: Axes, panel: Panel, points: pd.DataFrame) -> None:
    drawn = points[points["step"] > 0]
    layers = sorted(set(drawn["layer"]))
    for layer, colour in zip(layers, layer_colours(len(layers)), strict=True):
        own = drawn[drawn["layer"] == layer]
        axis.plot(
            own["step"], own["value"], color=matplotlib.colors.to_hex(colour), label=f"{layer}"
        )
    axis.axhline(0, **BASELINE)
    log_steps(axis, drawn["step"])
    axis.set_ylabel(panel.label)
    axis.legend(title="layer", frameon=False, fontsize=8, ncols=2)
