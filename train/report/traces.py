"""The parts of the report's plotly figures: the look, and an arm's lines.

Traces of one arm or run have the same ``legendgroup`` in all figures, so that the page hides it in
all of them at once. ``meta.tokens`` holds a line's other x axis.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from train.report.curves import thinned
from train.report.gather import Arm, proxy_mark

GREY = "#555555"
AXIS = {
    "gridcolor": "#e6e6e6",
    "linecolor": "#999999",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#999999",
    "zeroline": False,
    "title_standoff": 8,
}
STEPS = {"type": "log", "dtick": "D2", "tickformat": "~s"}
RATIOS = {"type": "log", "dtick": "D2", "tickformat": "~g"}
LEGEND_WIDTH = 38
"""Letters of a legend's line."""


def styled(figure: go.Figure, title: str, height: int, legend: bool = False) -> go.Figure:
    """The report's look."""
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "font_size": 15},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#222222"},
        template="none",
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        margin={"l": 72, "r": 16, "t": 44, "b": 48},
        showlegend=legend,
        legend={"tracegroupgap": 3, "font_size": 11, "itemsizing": "constant"},
        hoverlabel={"bgcolor": "white", "font_size": 12, "namelength": -1},
    )
    # Titles of panels; an annotation of ours has its size.
    for annotation in figure.select_annotations():
        annotation.font.size = min(12, annotation.font.size or 12)
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS)
    return figure


def rounded(values: Sequence[float] | pd.Series) -> list[float | None]:
    """Six significant digits, which is what a float32 has; None for what isn't finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def told(text: str, width: int = LEGEND_WIDTH) -> str:
    """Text for a legend or hover box: escaped, broken after commas."""
    lines = [""]
    # plotly would put a value in place of %{...} in a hover template.
    for part in escape(text).replace("%{", "%&#123;").split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f"{part}, "
    return "<br>".join(line.rstrip() for line in lines)[:-1]


def axis_title(text: str, arms: Sequence[Arm]) -> str:
    """An axis title that says so where proxies stand beside probabilities."""
    return text + proxy_mark(arms)


def group(arm: Arm) -> str:
    """The ``legendgroup`` of an arm."""
    return f"arm {arm.index}"


def add_arms(
    figure: go.Figure,
    arms: Sequence[Arm],
    metric: str,
    quantity: str,
    *,
    runs: bool = False,
    dash: str | None = None,
    markers: bool = False,
    place: dict | None = None,
) -> int:
    """Add each arm's mean and range, then, hidden at first, its runs; how many arms were added."""
    place = place or {}
    drawn = 0
    for arm in arms:
        drawn += add_curve(
            figure, arm, arm.curve(metric), quantity, dash=dash, markers=markers, place=place
        )
    several = [arm for arm in arms if len(arm.runs) > 1]
    heading = {"text": "<b>runs</b> (click to show)", "font_size": 11}
    for arm in several if runs else []:
        for run in arm.runs:
            curve = thinned(run.curve(metric))
            figure.add_scatter(
                x=curve["step"].tolist(),
                y=rounded(curve["value"]),
                meta={"tokens": curve["tokens"].tolist()},
                mode="lines",
                line={"color": arm.colour, "width": 1, "dash": arm.dash},
                visible="legendonly",
                legendgroup=f"run {run.name}",
                legendgrouptitle=heading,
                name=told(run.name),
                hovertemplate=f"<b>{told(run.name, 60)}</b><br>%{{x:,}}"
                f"<br>{quantity} %{{y:.4f}}<extra></extra>",
                **place,
            )
            heading = None
    return drawn


def add_curve(
    figure: go.Figure,
    arm: Arm,
    curve: pd.DataFrame,
    quantity: str,
    *,
    dash: str | None = None,
    markers: bool = False,
    place: dict,
) -> int:
    """Add an arm's mean over seeds and, if there are several, their range as a band."""
    curve = thinned(curve)
    if curve.empty:
        return 0
    steps, tokens = curve["step"].tolist(), curve["tokens"].tolist()
    if len(arm.runs) > 1:
        figure.add_scatter(
            x=steps + steps[::-1],
            y=rounded(curve["high"]) + rounded(curve["low"])[::-1],
            meta={"tokens": tokens + tokens[::-1]},
            fill="toself",
            fillcolor=arm.colour,
            opacity=0.16,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=group(arm),
            name=f"{told(arm.legend)}, range",
            **place,
        )
    seeds = f"mean of {len(arm.runs)} seeds" if len(arm.runs) > 1 else told(arm.runs[0].name, 60)
    figure.add_scatter(
        x=steps,
        y=rounded(curve["mean"]),
        meta={"tokens": tokens},
        customdata=np.stack([rounded(curve["low"]), rounded(curve["high"])], 1).tolist(),
        mode="lines+markers" if markers else "lines",
        marker={"size": 5},
        line={"color": arm.colour, "width": 2, "dash": dash or arm.dash},
        legendgroup=group(arm),
        name=told(arm.legend),
        hovertemplate=f"<b>{told(arm.whole_legend, 60)}</b><br>{seeds}<br>%{{x:,}}"
        f"<br>{quantity} %{{y:.4f}}"
        + ("<br>from %{customdata[0]:.4f} to %{customdata[1]:.4f}" if len(arm.runs) > 1 else "")
        + "<extra></extra>",
        **place,
    )
    return 1


def add_level(
    figure: go.Figure, level: float, text: str, *, log: bool = False, **place: int
) -> None:
    """Add a named horizontal line; log: on a logarithmic y axis."""
    line = {"color": GREY, "dash": "dot", "width": 1.2}
    figure.add_hline(y=level, line=line, **place)
    figure.add_annotation(
        x=0,
        # Unlike lines, annotations on a logarithmic axis stand at its exponents.
        y=math.log10(level) if log else level,
        xref="x domain",
        xanchor="left",
        yanchor="bottom",
        text=text,
        showarrow=False,
        font={"size": 10, "color": GREY},
        **place,
    )


def over_steps(figure: go.Figure) -> go.Figure:
    """The figure with logarithmic steps as its x axes."""
    figure.update_xaxes(**STEPS, title="step")
    # The page's switch of the x axis acts on these.
    figure.update_layout(meta={"over": "steps"})
    return figure
