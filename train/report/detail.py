"""One run in detail as plotly figures: every head over the steps, norm ratios by layer."""

from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.colors import to_hex
from plotly.subplots import make_subplots

from train.plotting import ALPHA_COLOURS, layer_colours
from train.report.curves import log_spaced, thinned
from train.report.gather import ReportRun
from train.report.traces import GREY, RATIOS, over_steps, rounded, styled, told

MOST_FRAMES = 30
"""Recorded steps of the slider; more are thinned to about so many, log-spaced."""

MOST_NORMS = 120
"""Recorded steps of a curve by layer."""

NORMS = {
    "norm_first/massive_ratio": "hidden state, row's first token",
    "norm_first/value_ratio": "value, row's first token",
    "norm/massive_ratio": "hidden state, documents' first tokens",
    "norm/value_ratio": "value, documents' first tokens",
}


def head_maps(run: ReportRun) -> go.Figure | None:
    """Layers x heads of the first key's mean alpha, a frame a recorded step, moved by a slider."""
    if run.first.empty:
        return None
    layers = range(int(run.first["layer"].max()) + 1)
    heads = range(int(run.first["head"].max()) + 1)
    steps = log_spaced(run.first["step"], MOST_FRAMES)
    by_step = dict(tuple(run.first.groupby("step")))
    alpha = "alpha (proxy)" if run.is_proxy else "alpha"
    draw = partial(
        go.Heatmap,
        x=list(heads),
        y=list(layers),
        zmin=0,
        zmax=1,
        colorscale=ALPHA_COLOURS.replace("_r", "").capitalize(),
        reversescale=ALPHA_COLOURS.endswith("_r"),
        colorbar={"title": {"text": alpha, "side": "right"}, "thickness": 12, "outlinewidth": 0},
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{alpha} %{{z:.4f}}<extra></extra>",
    )
    grids = [_grid(by_step[step], len(layers), len(heads)) for step in steps]
    figure = go.Figure(
        data=draw(z=grids[-1]),
        frames=[
            go.Frame(name=str(step), data=[{"type": "heatmap", "z": grid}])
            for step, grid in zip(steps, grids, strict=True)
        ],
    )
    uniform = by_step[steps[-1]]["baseline"].mean()
    title = f"Attention to the first key by head, T = 64 (uniform {uniform:.3f})"
    styled(figure, title, min(900, 190 + 22 * max(6, len(layers))))
    figure.update_xaxes(title="head", showgrid=False, showline=False, dtick=_every(len(heads)))
    figure.update_yaxes(
        title="layer",
        showgrid=False,
        showline=False,
        autorange="reversed",
        dtick=_every(len(layers)),
    )
    figure.update_layout(margin_b=110, sliders=[_slider(steps)])
    return figure


def norms_by_layer(run: ReportRun) -> go.Figure | None:
    """Norm ratios of the first tokens of rows and of documents, a line a layer."""
    by_panel = {
        prefix: sorted(name for name in run.metrics if name.startswith(f"{prefix}/layer_"))
        for prefix in NORMS
    }
    panels = {prefix: names for prefix, names in by_panel.items() if names}
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = make_subplots(
        rows=rows,
        cols=2,
        horizontal_spacing=0.09,
        vertical_spacing=0.22,
        subplot_titles=[NORMS[prefix] for prefix in panels],
    )
    layers = max(len(names) for names in panels.values())
    colours = [to_hex(colour) for colour in layer_colours(layers)]
    for index, names in enumerate(panels.values()):
        place = {"row": index // 2 + 1, "col": index % 2 + 1}
        for layer, name in enumerate(names):
            curve = thinned(run.curve(name), MOST_NORMS)
            figure.add_scatter(
                x=curve["step"].tolist(),
                y=rounded(curve["value"]),
                meta={"tokens": curve["tokens"].tolist()},
                mode="lines",
                line={"color": colours[layer], "width": 1.5},
                name=f"layer {layer}",
                legendgroup=f"layer {layer}",
                showlegend=index == 0,
                hovertemplate=f"layer {layer}<br>%{{x:,}}<br>ratio %{{y:.3f}}<extra></extra>",
                **place,
            )
        figure.add_hline(y=1, line={"color": GREY, "dash": "dot", "width": 1.2}, **place)
    styled(figure, f"Norm ratios by layer: {told(run.name, 80)}", 90 + 260 * rows, legend=True)
    figure.update_layout(margin_t=70)
    figure.update_yaxes(**RATIOS)
    figure.update_yaxes(title="norm / median", col=1)
    return over_steps(figure)


def _grid(rows: pd.DataFrame, layers: int, heads: int) -> list[list[float | None]]:
    """[layers][heads] of alpha; None where a head has no sample."""
    grid_LH = np.full((layers, heads), np.nan)
    grid_LH[rows["layer"].to_numpy(dtype=int), rows["head"].to_numpy(dtype=int)] = rows["alpha"]
    return [rounded(row_H) for row_H in grid_LH]


def _every(count: int) -> int:
    return 1 if count <= 16 else 4


def _slider(steps: list[int]) -> dict:
    at_once = {
        "mode": "immediate",
        "frame": {"duration": 0, "redraw": True},
        "transition": {"duration": 0},
    }
    return {
        "active": len(steps) - 1,
        "currentvalue": {"prefix": "step ", "font_size": 13},
        "pad": {"t": 36, "b": 0},
        "ticklen": 3,
        "minorticklen": 0,
        "font_size": 10,
        "steps": [
            {"label": f"{step:,}", "method": "animate", "args": [[str(step)], at_once]}
            for step in steps
        ],
    }
