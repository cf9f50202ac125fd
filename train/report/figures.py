"""Arms side by side as plotly figures: mean over seeds, range as a band, each run on demand."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from train.report.curves import mean_and_range, over_layers, thinned
from train.report.gather import NORM_PANELS, Arm
from train.report.traces import (
    GREY,
    RATIOS,
    add_arms,
    add_curve,
    add_level,
    axis_title,
    group,
    over_steps,
    rounded,
    styled,
    told,
)

UNTRAINED_DASH = "dot"
"""Line of a figure that rests on a BOS which the model never saw."""


def excess_mass(arms: Sequence[Arm]) -> go.Figure | None:
    """Excess mass of the first key while training; the one figure with a legend."""
    figure = go.Figure()
    drawn = add_arms(figure, arms, "sink/excess", "excess mass", runs=True)
    if not drawn:
        return None
    add_level(figure, 0.0, "uniform attention")
    styled(figure, "Excess mass of the first key while training", 420, legend=True)
    figure.update_yaxes(title=axis_title("excess mass", arms), rangemode="tozero")
    return over_steps(figure)


def mass(arms: Sequence[Arm]) -> go.Figure | None:
    """Mass of the first key while training, with the baseline of uniform attention."""
    figure = go.Figure()
    if not add_arms(figure, arms, "sink/mass", "mass"):
        return None
    baselines = [(arm, arm.curve("sink/baseline")) for arm in arms]
    baselines = [(arm, curve) for arm, curve in baselines if len(curve)]
    # Most often the same for all arms, which one grey line says best.
    longest = max(baselines, key=lambda both: both[1]["step"].max(), default=None)
    same = longest is not None and all(_agree(curve, longest[1]) for _, curve in baselines)
    for arm, whole in [longest] if same else baselines:
        curve = thinned(whole)
        figure.add_scatter(
            x=curve["step"].tolist(),
            y=rounded(curve["mean"]),
            meta={"tokens": curve["tokens"].tolist()},
            mode="lines",
            line={"color": GREY if same else arm.colour, "dash": "dot", "width": 1.2},
            legendgroup="baseline" if same else group(arm),
            name="uniform attention",
            hovertemplate="uniform attention: %{y:.4f}<extra></extra>",
        )
    styled(figure, "Mass of the first key while training", 330)
    figure.update_yaxes(title=axis_title("mass", arms), rangemode="tozero")
    return over_steps(figure)


def _agree(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two curves have steps in common and, there, the same means to four digits."""
    both = one.merge(other, on="step")
    return len(both) > 0 and np.allclose(both["mean_x"], both["mean_y"], rtol=0, atol=5e-5)


def rate(arms: Sequence[Arm]) -> go.Figure | None:
    """Sink rate while training: each row, layer and head against 0.3, then averaged."""
    figure = go.Figure()
    if not add_arms(figure, arms, "sink/rate_030", "rate"):
        return None
    styled(figure, "Sink rate while training", 330)
    title = axis_title("share of alpha > 0.3", arms)
    figure.update_yaxes(title=title, rangemode="tozero")
    return over_steps(figure)


def probe_excess(arms: Sequence[Arm]) -> go.Figure | None:
    """Excess mass on held-out prompts of 64 tokens, without and with a BOS before the text, at
    validations."""
    panels = {"text": "text", "bos_text": "BOS + text"}
    title = "Excess mass on held-out prompts, T = 64"
    return _prompt_excess(arms, panels, "probe/t64_{}/excess", title)


def kept_excess(arms: Sequence[Arm]) -> go.Figure | None:
    """The same at the kept checkpoints that ``scripts.probe`` probed, on other prompts too."""
    panels = {
        "text": "text",
        "bos_text": "BOS + text",
        "random": "random tokens",
        "repeated": "one token repeated",
    }
    title = "Excess mass at kept checkpoints, T = 64"
    return _prompt_excess(arms, panels, "kept/sinks/{}/excess", title)


def _prompt_excess(
    arms: Sequence[Arm], panels: dict[str, str], metric: str, heading: str
) -> go.Figure | None:
    """A panel a kind of prompt that any arm has; ``metric`` with the prompt's name in it."""
    panels = {
        name: title
        for name, title in panels.items()
        if any(len(arm.curve(metric.format(name))) for arm in arms)
    }
    if not panels:
        return None
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=list(panels.values()),
    )
    for column, (name, title) in enumerate(panels.items(), start=1):
        for arm in arms:
            untrained = name == "bos_text" and not arm.knows_bos
            add_arms(
                figure,
                [arm],
                metric.format(name),
                f"excess on {title}" + (", BOS untrained" if untrained else ""),
                dash=UNTRAINED_DASH if untrained else None,
                markers=True,
                place={"row": 1, "col": column},
            )
        add_level(figure, 0.0, "uniform attention", row=1, col=column)
    styled(figure, heading, 330)
    figure.update_layout(margin_t=64)
    figure.update_yaxes(title=axis_title("excess mass", arms), col=1)
    return over_steps(figure)


def canonical_loss(arms: Sequence[Arm]) -> go.Figure | None:
    """Held-out loss on the labels that all arms share."""
    figure = go.Figure()
    if not add_arms(figure, arms, "val/canonical_loss", "canonical loss", markers=True):
        return None
    styled(figure, "Canonical loss", 330)
    figure.update_yaxes(title="nats a label")
    return over_steps(figure)


def mass_against_loss(arms: Sequence[Arm]) -> go.Figure | None:
    """One point a run, at the last values its arm shares; open where the mass is a proxy."""
    figure = go.Figure()
    for arm in arms:
        points = arm.mass_against_loss()
        if points.empty:
            continue
        symbol = "diamond-open" if arm.is_proxy else "circle"
        figure.add_scatter(
            x=rounded(points["loss"]),
            y=rounded(points["mass"]),
            text=[told(name, 60) for name in points["name"]],
            customdata=rounded(points["baseline"]),
            mode="markers",
            marker={"color": arm.colour, "size": 10, "symbol": symbol, "line_width": 1.5},
            legendgroup=group(arm),
            name=told(arm.legend),
            hovertemplate=f"<b>%{{text}}</b><br>{told(arm.whole_legend, 60)}<br>"
            "loss %{x:.4f} nats<br>mass %{y:.4f}, uniform %{customdata:.4f}<extra></extra>",
        )
    if not figure.data:
        return None
    levels = {round(level, 4) for arm in arms for level in arm.mass_against_loss()["baseline"]}
    if len(levels) == 1:
        add_level(figure, levels.pop(), "uniform attention")
    styled(figure, "Mass against canonical loss", 330)
    figure.update_xaxes(title="canonical loss, nats a label")
    figure.update_yaxes(title=axis_title("mass, T = 64", arms), rangemode="tozero")
    return figure


def norm_ratios(arms: Sequence[Arm]) -> go.Figure | None:
    """How far the row's first token stands out, in the layer where it does most."""
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.08,
        subplot_titles=[title for title, _ in NORM_PANELS.values()],
    )
    drawn = 0
    for column, (prefix, (title, over)) in enumerate(NORM_PANELS.items(), start=1):
        for arm in arms:
            curves = [over_layers(run.metrics, prefix, over) for run in arm.runs]
            place = {"row": 1, "col": column}
            drawn += add_curve(figure, arm, mean_and_range(curves), title, place=place)
        add_level(figure, 1.0, "as ordinary tokens", log=True, row=1, col=column)
    if not drawn:
        return None
    styled(figure, "Norms of the row's first token", 330)
    figure.update_layout(margin_t=64)
    figure.update_yaxes(**RATIOS, title="norm / median of ordinary tokens", row=1, col=1)
    figure.update_yaxes(**RATIOS, row=1, col=2)
    return over_steps(figure)
