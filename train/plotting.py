"""What all matplotlib figures of the project share."""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

matplotlib.use("Agg")

LAYER_COLOURS = "viridis"
ALPHA_COLOURS = "magma_r"
BASELINE = {"color": "0.35", "linestyle": "--", "linewidth": 1.2}

ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by colour-blind readers too (Okabe and Ito), without the yellow, pale on white."""


def new_figure(
    width: float = 6.4, height: float = 4.0, count: int = 1, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches with ``count`` axes, row by row, ``columns`` (by
    default all) side by side."""
    columns = columns or count
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def log_steps(axis: Axes, steps: pd.Series) -> None:
    """A logarithmic axis over the recorded ``steps``, spaced like the checkpoints."""
    # The recorded steps are all positive.
    if steps.max() > steps.min() > 0:
        axis.set_xscale("log")
        axis.set_xlim(steps.min(), steps.max())
        plain_numbers(axis.xaxis)
    axis.set_xlabel("step")


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, ... in plain numbers; a short one evenly."""
    low, high = axis.get_data_interval()
    locator = LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(6)
    axis.set_major_locator(locator)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def layer_colours(count: int) -> np.ndarray:
    """[count, 4] RGBA, dark for the first layer."""
    # Stops short of the palette's pale end, which is hard to see on white.
    return matplotlib.colormaps[LAYER_COLOURS](np.linspace(0, 0.88, count))
