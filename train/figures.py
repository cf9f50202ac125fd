"""Pictures of a run, drawn from its folder alone: ``figures/*.png``."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.plotting import (
    ALPHA_COLOURS,
    BASELINE,
    layer_colours,
    log_steps,
    new_figure,
    plain_numbers,
)
from train.run_folder import RunFolder


def draw_figures(folder: RunFolder) -> list[Path]:
    """Draw what the folder's data allows and return the files.

    losses: training and held-out loss; sinks_by_layer: the first key's mass by layer over steps;
    sinks_by_head: its latest mean by layer and head; norm_ratios: of first tokens, by layer.
    """
    drawn = []
    metrics = pd.read_csv(folder.metrics)
    figures = {"losses": _losses(metrics)}
    parts = sorted(folder.sinks.glob("part-*.parquet"))
    if parts:
        sinks = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
        first = sinks[sinks["key"] == "first"]
        if len(first):
            figures["sinks_by_layer"] = _sinks_by_layer(first)
            figures["sinks_by_head"] = _sinks_by_head(first)
        figures["norm_ratios"] = _norm_ratios(metrics)
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder.figures / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150)
        drawn.append(path)
    return drawn


def _losses(metrics: pd.DataFrame) -> Figure:
    figure, (axis,) = new_figure()
    series = {
        "train/loss": ("training", {"color": "0.6"}),
        "val/canonical_loss": ("held out, canonical", {"color": "tab:red", "marker": "o"}),
        # Often over the other: dashed, so that both are seen.
        "val/own_loss": (
            "held out, packed alike",
            {"color": "tab:blue", "marker": ".", "linestyle": "--"},
        ),
    }
    for name, (label, style) in series.items():
        if name in metrics:
            rows = metrics[["step", name]].dropna()
            axis.plot(rows["step"], rows[name], label=label, **style)
    axis.set(xlabel="step", ylabel="loss (nats a label)", title="Loss")
    axis.legend(frameon=False)
    return figure


def _sinks_by_layer(first: pd.DataFrame) -> Figure:
    figure, (axis,) = new_figure()
    layers = sorted(first["layer"].unique())
    for layer, colour in zip(layers, layer_colours(len(layers)), strict=True):
        mass = first[first["layer"] == layer].groupby("step")["alpha"].mean()
        axis.plot(mass.index, mass, color=colour, label=f"layer {layer}")
    baseline = first.groupby("step")["baseline"].mean()
    axis.plot(baseline.index, baseline, label="uniform attention", **BASELINE)
    log_steps(axis, first["step"])
    axis.set_ylim(0, max(0.2, 1.1 * first.groupby(["step", "layer"])["alpha"].mean().max()))
    axis.set_ylabel(f"mean attention to the first key{_proxy(first)}")
    axis.set_title("First key, first 64 queries of a row")
    axis.legend(frameon=False, ncols=1 + len(layers) // 8, fontsize=8, loc="upper left")
    return figure


def _proxy(table: pd.DataFrame) -> str:
    """A mark for weights that don't sum to 1, whose shares aren't probabilities."""
    return " (proxy)" if (table["alpha_kind"] == "proxy").any() else ""


def _sinks_by_head(first: pd.DataFrame) -> Figure:
    step = first["step"].max()
    latest = first[first["step"] == step]
    grid = latest.pivot(index="layer", columns="head", values="alpha")
    title = f"Attention to the first key, step {step}"
    return _head_map(grid, latest["baseline"].mean(), title, _proxy(first))


def _head_map(grid: pd.DataFrame, uniform: float, title: str, mark: str) -> Figure:
    """Layers down, heads across, on a fixed scale with the uniform baseline marked."""
    layers, heads = grid.shape
    figure, (axis,) = new_figure(width=max(4.6, 2.6 + 0.45 * heads), height=1.8 + 0.4 * layers)
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=ALPHA_COLOURS, aspect="auto")
    bright = image.norm(grid.to_numpy()) > 0.55
    for (row, column), value in np.ndenumerate(grid.to_numpy()):
        colour = "white" if bright[row, column] else "black"
        if heads <= 16:
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
    axis.set_xticks(range(heads), grid.columns)
    axis.set_yticks(range(layers), grid.index)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set(xlabel="head", ylabel="layer", title=title)
    bar = figure.colorbar(image, ax=axis, label=f"mean attention{mark}")
    bar.ax.axhline(uniform, **BASELINE)
    bar.ax.text(
        1.15, uniform, " uniform", va="center", size=7, transform=bar.ax.get_yaxis_transform()
    )
    return figure


def head_map_picture(
    alpha_LH: np.ndarray, uniform: float, title: str, alpha_kind: str
) -> np.ndarray:
    """A small picture of alpha by layer and head, bytes [height, width, 4].

    uniform: alpha of a head that attends uniformly. NaN, of a head without a sample, stays blank.
    """
    mark = " (proxy)" if alpha_kind == "proxy" else ""
    figure = _head_map(pd.DataFrame(alpha_LH), uniform, title, mark)
    figure.set_dpi(80)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _norm_ratios(metrics: pd.DataFrame) -> Figure | None:
    panels = {
        "norm_first/massive_ratio": "hidden state of the row's first token",
        "norm_first/value_ratio": "value of the row's first token",
    }
    columns = {
        panel: sorted(name for name in metrics if name.startswith(f"{panel}/")) for panel in panels
    }
    if not all(columns.values()):
        return None
    figure, axes = new_figure(width=9.6, count=2)
    for axis, (panel, title) in zip(axes, panels.items(), strict=True):
        names = columns[panel]
        for name, colour in zip(names, layer_colours(len(names)), strict=True):
            rows = metrics[["step", name]].dropna()
            label = name.rsplit("/", 1)[1].replace("_0", " ").replace("_", " ")
            axis.plot(rows["step"], rows[name], color=colour, label=label)
        axis.axhline(1, **BASELINE)
        axis.set_yscale("log")
        plain_numbers(axis.yaxis)
        log_steps(axis, rows["step"])
        axis.set(ylabel="norm over the median of ordinary tokens", title=title)
    axes[0].legend(frameon=False, fontsize=8, ncols=1 + len(columns[panel]) // 8)
    return figure
