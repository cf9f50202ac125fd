"""Curves of the report: means over runs, extremes over layers, thinned for drawing."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import pandas as pd

MOST_RECORDS = 400
"""Records of a curve that are drawn; more are thinned to about so many, log-spaced."""


def common_steps(indexes: Sequence[pd.Index]) -> pd.Index:
    """The steps in all of ``indexes``, ascending; none of no index."""
    return reduce(pd.Index.intersection, indexes).sort_values() if indexes else pd.Index([], int)


def mean_and_range(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean, smallest and largest value over curves at the steps that they all have.

    curves: columns step, tokens, value. Gives step, tokens, mean, low, high. Curves without rows
    are left out, and no curve at all gives no rows.
    """
    by_step = [curve.set_index("step") for curve in curves if len(curve)]
    if not by_step:
        return pd.DataFrame({"step": [], "tokens": [], "mean": [], "low": [], "high": []})
    steps = common_steps([curve.index for curve in by_step])
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


def short_count(value: float) -> str:
    """``153.6k``, ``4.9M``, ``1.05B``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"
