"""When a sink appears: the onset of heads and of a run, from the curve measured while training.

The curve is ``Run.sinks()`` at key ``first``: alpha of the row's first key over 64 queries, by
layer and head, at every record (``train.sink_table``). Two definitions:

    head   the first record from which on alpha is above 0.3 in at least half of the samples, at
           this and every later record
    run    the first record from which on both hold: the excess mass, mean over heads of
           alpha - baseline, stays at or above half of its final value (the mean over the last tenth
           of the records), and more than two heads are past their onset; a run in which they never
           do is *censored* at its last record

Half of the final mass is taken of the excess: half of alpha itself would lie below the baseline
where sinks are weak. A curve that rises and falls back has no onset in its first rise. Censored
runs are kept: they say "later than the end". Two errors come with an onset. It lies somewhere after
the record before it: the *spacing*. And a run's heads are few: the *interval* holds 95 % of the
onsets of runs whose heads are drawn from the run's with replacement, censored draws at its open
end. A head counts in a draw's mass as often as it was drawn, but it is one head past its onset, not
three: a run with few sink heads has many censored draws.

Moments are given in steps, in tokens, and as the sum of the learning rates of all steps so far,
which is what decides at small rates (arXiv 2410.10781, table 9: fewer steps at a higher rate). The
sum is exact with ``scheduled_rates``; rows of metrics.csv don't tell what lay between them.

Axes: S records, N heads of all layers, D bootstrap draws.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kernels.errors import require
from train.config import RunConfig
from train.metrics import THRESHOLDS
from train.sink_table import threshold_name

HEAD_ALPHA = 0.3
"""Alpha above which a head is a sink in a sample (arXiv 2410.10781)."""

HEAD_SHARE = 0.5
"""Share of the samples in which it must be one."""

FINAL_SHARE = 0.1
"""Share of the records, the last ones, whose mean is the final mass."""

MASS_SHARE = 0.5
"""Share of the final mass at which a run has its onset."""

MIN_HEADS = 3
"""Different heads that must be past their onset: more than two."""

DRAWS = 200
"""Bootstrap draws of the heads."""

INTERVAL = (0.025, 0.975)
"""Quantiles of the draws that bound the interval."""

assert HEAD_ALPHA in THRESHOLDS


@dataclass(frozen=True, order=True)
class Moment:
    """A time in training, or the distance of two: updates, input tokens, and the sum of the
    learning rates of those updates (nan if metrics.csv has none)."""

    step: int
    tokens: int
    lr_sum: float

    def __sub__(self, other: "Moment") -> "Moment":
        return Moment(
            self.step - other.step, self.tokens - other.tokens, self.lr_sum - other.lr_sum
        )


@dataclass(frozen=True)
class HeadOnset:
    """onset, spacing: None where the head's alpha doesn't stay above."""

    layer: int
    head: int
    onset: Moment | None
    spacing: Moment | None


@dataclass(frozen=True)
class RunOnset:
    """When the sink of a run appears.

    onset, spacing, low, high: the moment, its distance to the record before, and the interval; low
    or high None lies beyond the end of the run. All None in a censored run.
    censored_at: the last record of a censored run, else None.
    censored_draws: share of the bootstrap draws that have no onset.
    sink_heads, heads: how many heads have an onset, of how many.
    final_excess: the final mass above the baseline.
    alpha_kind: ``probability``, or ``proxy`` for weights that no softmax made.
    """

    onset: Moment | None
    spacing: Moment | None
    low: Moment | None
    high: Moment | None
    censored_at: Moment | None
    censored_draws: float
    sink_heads: int
    heads: int
    final_excess: float
    alpha_kind: str


def head_onsets(sinks: pd.DataFrame, metrics: pd.DataFrame) -> list[HeadOnset]:
    """The onset of every (layer, head), in this order.

    sinks: ``Run.sinks()``. metrics: ``scheduled_rates`` of its config, or, if that isn't known,
    ``Run.metrics()``; see ``cumulative_lr``. Raises ``UserError`` if sinks has no record of the
    first key.
    """
    curves = _Curves(sinks, metrics)
    return [
        HeadOnset(int(layer), int(head), *curves.moment_and_spacing(first))
        for (layer, head), first in zip(curves.heads, curves.first_above_N(), strict=True)
    ]


def run_onset(
    sinks: pd.DataFrame, metrics: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0
) -> RunOnset:
    """The onset of a run and its errors; the same for the same tables.

    sinks, metrics: as for ``head_onsets``, and the same ``UserError``. draws, seed: of the
    bootstrap.
    """
    curves = _Curves(sinks, metrics)
    heads = len(curves.heads)
    onset_N = curves.first_above_N()
    whole_1N = np.ones((1, heads), dtype=int)
    (first,), (final,) = curves.run_firsts(whole_1N, onset_N)
    onset, spacing = curves.moment_and_spacing(first)
    generator = np.random.default_rng(seed)
    times_DN = generator.multinomial(heads, np.full(heads, 1 / heads), size=draws)
    firsts_D, _ = curves.run_firsts(times_DN, onset_N)
    # A censored draw has its onset after the last record, so it sorts last.
    records = len(curves.moments)
    sorted_D = np.where(firsts_D < 0, records, firsts_D)
    low, high = np.quantile(sorted_D, INTERVAL, method="inverted_cdf").astype(int)
    beyond = [*curves.moments, None]
    return RunOnset(
        onset=onset,
        spacing=spacing,
        low=beyond[low] if onset else None,
        high=beyond[high] if onset else None,
        censored_at=None if onset else curves.moments[-1],
        censored_draws=float((firsts_D < 0).mean()),
        sink_heads=int((onset_N >= 0).sum()),
        heads=heads,
        final_excess=float(final),
        alpha_kind=curves.alpha_kind,
    )


def scheduled_rates(config: RunConfig, last: int) -> pd.DataFrame:
    """The learning rate of every step from 1 to ``last`` as the run's schedule gives it.

    Columns ``step`` and ``train/lr``: the peak ``optimizer.lr`` times the schedule's factor. Step n
    of metrics.csv is the schedule's update n - 1.
    """
    total_steps = config.schedule.total_steps or config.trainer.max_steps
    steps = np.arange(1, last + 1)
    factors = [config.schedule.factor(step - 1, total_steps) for step in steps.tolist()]
    return pd.DataFrame({"step": steps, "train/lr": config.optimizer.lr * np.array(factors)})


def cumulative_lr(metrics: pd.DataFrame, steps: np.ndarray) -> np.ndarray:
    """The sum of the learning rates of steps 1 to s, for each s of ``steps``, float64.

    metrics: columns ``step`` and ``train/lr``. Exact if it has a row for every step, as
    ``scheduled_rates`` has. Else rates between two rows are taken on the line between them, those
    before the first on the line through the first two, those after the last as the last: wrong
    where the schedule bends between rows, so by up to half a warm-up that ends at the first. nan
    if there is no ``train/lr``.
    """
    known = pd.DataFrame({"step": metrics["step"], "lr": metrics.get("train/lr", np.nan)}).dropna()
    known = known[known["step"] >= 1].drop_duplicates("step", keep="last").sort_values("step")
    if known.empty:
        return np.full(len(steps), math.nan)
    at, lr = known["step"].to_numpy(), known["lr"].to_numpy()
    every = np.arange(1, max(at[-1], np.max(steps)) + 1)
    rates = np.interp(every, at, lr)
    if len(at) > 1:
        slope = (lr[1] - lr[0]) / (at[1] - at[0])
        before = every < at[0]
        rates[before] = np.maximum(0, lr[0] - slope * (at[0] - every[before]))
    return np.concatenate([[0.0], np.cumsum(rates)])[np.asarray(steps)]


def first_that_stays(holds_S: np.ndarray, known_S: np.ndarray | None = None) -> np.ndarray:
    """Along the first axis, the index of the first record from which on ``holds_S`` stays true; -1
    where the last record isn't. Records that aren't ``known_S`` decide nothing."""
    known_S = np.ones_like(holds_S) if known_S is None else known_S
    fails_S = known_S & ~holds_S
    # All records from here on are fine, and this one is known to be.
    later_S = ~np.flip(np.logical_or.accumulate(np.flip(fails_S, 0), axis=0), 0)
    stays_S = later_S & known_S
    return np.where(stays_S.any(0), stays_S.argmax(0), -1)


class _Curves:
    """A run's records of the first key as arrays by record and head, nan where a head has none."""

    def __init__(self, sinks: pd.DataFrame, metrics: pd.DataFrame):
        first = sinks[sinks["key"] == "first"]
        require(
            len(first) > 0, "sinks", "must have records of the first key over 64 queries", "none"
        )
        first = first.drop_duplicates(["step", "layer", "head"], keep="last")
        over = first[f"over_{threshold_name(HEAD_ALPHA)}"] / first["count"]
        first = first.assign(share=over, excess=first["alpha"] - first["baseline"])
        grid = first.pivot(index="step", columns=["layer", "head"], values=["share", "excess"])
        grid = grid.sort_index().sort_index(axis=1)
        self.heads = list(grid["share"].columns)
        self.share_SN = grid["share"].to_numpy(dtype=float)
        self.excess_SN = grid["excess"].to_numpy(dtype=float)
        self.alpha_kind = "proxy" if (first["alpha_kind"] == "proxy").any() else "probability"
        tokens = first.groupby("step")["tokens"].last()
        lr_sum = cumulative_lr(metrics, tokens.index.to_numpy(dtype=int))
        self.moments = [
            Moment(int(step), int(seen), float(rate))
            for (step, seen), rate in zip(tokens.items(), lr_sum, strict=True)
        ]

    def first_above_N(self) -> np.ndarray:
        """Index of each head's onset, -1 for none."""
        return first_that_stays(self.share_SN >= HEAD_SHARE, np.isfinite(self.share_SN))

    def run_firsts(
        self, times_DN: np.ndarray, onset_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[D] index of the onset (-1 for none) and final excess of a run with each head as many
        times as ``times_DN`` says; onset_N: of ``first_above_N``."""
        there_SN = np.isfinite(self.excess_SN)
        heads_SD = there_SN.astype(float) @ times_DN.T
        sums_SD = np.where(there_SN, self.excess_SN, 0.0) @ times_DN.T
        known_SD = heads_SD > 0
        excess_SD = np.divide(sums_SD, heads_SD, out=np.zeros_like(sums_SD), where=known_SD)
        last = math.ceil(FINAL_SHARE * len(excess_SD))
        counts_D = known_SD[-last:].sum(0)
        final_D = excess_SD[-last:].sum(0) / np.maximum(1, counts_D)
        # Sums of many heads in two orders differ in their last digits: a tie must stay one.
        slack_D = 1e-12 * np.abs(final_D)
        holds_SD = excess_SD >= MASS_SHARE * final_D - slack_D
        half_D = first_that_stays(holds_SD, known_SD)
        enough_D = _when_enough(times_DN > 0, onset_N)
        # Heads stay past their onset, so both hold from the later of the two on.
        has_onset_D = (half_D >= 0) & (enough_D >= 0) & (final_D > 0)
        return np.where(has_onset_D, np.maximum(half_D, enough_D), -1), final_D

    def moment_and_spacing(self, first: int) -> tuple[Moment | None, Moment | None]:
        """A record's moment and its distance to the one before (step 0 before the first)."""
        if first < 0:
            return None, None
        before = self.moments[first - 1] if first > 0 else Moment(0, 0, 0.0)
        return self.moments[first], self.moments[first] - before


def _when_enough(drawn_DN: np.ndarray, onset_N: np.ndarray) -> np.ndarray:
    """[D] index of the record at which ``MIN_HEADS`` of the heads drawn are past their onsets, -1
    if there are never so many."""
    never = np.iinfo(onset_N.dtype).max
    onset_DN = np.where(drawn_DN & (onset_N >= 0), onset_N, never)
    # A model of two heads has no third.
    padded_DN = np.pad(onset_DN, ((0, 0), (0, MIN_HEADS)), constant_values=never)
    enough_D = np.sort(padded_DN, axis=1)[:, MIN_HEADS - 1]
    return np.where(enough_D == never, -1, enough_D)
