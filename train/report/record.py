"""Figures of record: the report's main curves through matplotlib, as PNG and SVG."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.files import write_atomically
from train.plotting import BASELINE, log_steps, new_figure, plain_numbers
from train.report.curves import mean_and_range, over_layers
from train.report.gather import NORM_PANELS, Arm, proxy_mark

LINE_STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
"""matplotlib's names of plotly's line styles."""

LETTERS = 11
"""Of a legend's line, for each inch of the figure."""

COLUMNS = 4
"""Of a legend, at most."""


def draw_record(arms: Sequence[Arm], folder: Path) -> list[Path]:
    """Draw what the runs' data allows into ``folder``; the files, a PNG and an SVG each.

    excess_mass: mean over seeds and range; mass_against_loss: a point a run; norm_ratios: of the
    row's first token, in the layer where it stands out most.
    """
    figures = {
        "excess_mass": _excess_mass(arms),
        "mass_against_loss": _mass_against_loss(arms),
        "norm_ratios": _norm_ratios(arms),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    # The same bytes for the same runs: no random ids, no date.
    with matplotlib.rc_context({"svg.hashsalt": "sinklab"}):
        for name, figure in figures.items():
            for ending in ("png", "svg") if figure is not None else ():
                path = folder / f"{name}.{ending}"
                metadata = {"Date": None} if ending == "svg" else {}
                content = io.BytesIO()
                figure.savefig(content, format=ending, dpi=150, metadata=metadata)
                write_atomically(path, content.getvalue())
                drawn.append(path)
    return drawn


def _excess_mass(arms: Sequence[Arm]) -> Figure | None:
    figure, (axis,) = new_figure()
    curves = [(arm, arm.curve("sink/excess")) for arm in arms]
    if not _draw_curves(axis, curves):
        return None
    axis.axhline(0, label="uniform attention", **BASELINE)
    axis.set(
        ylabel=f"mass − uniform baseline{proxy_mark(arms)}", title="First key, first 64 queries"
    )
    _legend(figure)
    return figure


def _mass_against_loss(arms: Sequence[Arm]) -> Figure | None:
    figure, (axis,) = new_figure(width=5.2)
    levels = set()
    for arm in arms:
        points = arm.mass_against_loss()
        if points.empty:
            continue
        levels |= set(points["baseline"].round(4))
        colours = {"facecolors": "none" if arm.is_proxy else arm.colour, "edgecolors": arm.colour}
        axis.scatter(points["loss"], points["mass"], s=36, label=_told(arm.legend), **colours)
    if not levels:
        return None
    if len(levels) == 1:
        axis.axhline(levels.pop(), label="uniform attention", **BASELINE)
    # Room for the topmost point as a whole.
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set(xlabel="canonical loss (nats a label)", ylabel=f"mass, T = 64{proxy_mark(arms)}")
    axis.set_title("Mass against canonical loss")
    _legend(figure)
    return figure


def _norm_ratios(arms: Sequence[Arm]) -> Figure | None:
    figure, axes = new_figure(width=9.6, count=2)
    drawn = False
    for axis, (prefix, (title, over)) in zip(axes, NORM_PANELS.items(), strict=True):
        curves = [
            (arm, mean_and_range([over_layers(run.metrics, prefix, over) for run in arm.runs]))
            for arm in arms
        ]
        drawn |= _draw_curves(axis, curves)
        axis.axhline(1, label="as ordinary tokens", **BASELINE)
        axis.set_yscale("log")
        plain_numbers(axis.yaxis)
        axis.set(ylabel="norm over the median of ordinary tokens", title=f"Row's first: {title}")
    if not drawn:
        return None
    _legend(figure)
    return figure


def _draw_curves(axis: Axes, curves: list[tuple[Arm, pd.DataFrame]]) -> bool:
    """Means with bands over logarithmic steps; whether there was any."""
    curves = [(arm, curve[curve["step"] > 0]) for arm, curve in curves]
    curves = [(arm, curve) for arm, curve in curves if len(curve)]
    for arm, curve in curves:
        style = {"color": arm.colour, "linestyle": LINE_STYLES[arm.dash]}
        axis.plot(curve["step"], curve["mean"], label=_told(arm.legend), **style)
        if len(arm.runs) > 1:
            axis.fill_between(
                curve["step"], curve["low"], curve["high"], color=arm.colour, alpha=0.16, lw=0
            )
    if curves:
        log_steps(axis, pd.concat([curve["step"] for _, curve in curves]))
    return bool(curves)


def _legend(figure: Figure) -> None:
    """One legend for all axes, below them, for which the figure grows: it covers no curve."""
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    width = int(LETTERS * figure.get_figwidth())
    labels = [textwrap.fill(label, width, break_on_hyphens=False) for label in entries]
    for columns in range(min(COLUMNS, len(labels)), 0, -1):
        legend = figure.legend(
            entries.values(),
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
        size = legend.get_tightbbox()
        if columns == 1 or size.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def _told(label: str) -> str:
    # A label that begins with an underscore would be left out of the legend; $ starts a formula.
    return label.lstrip("_").replace("$", r"\$")
