"""Verdicts by the criteria that a finding wrote down, apart for direction and magnitude.

In this order:

    not decided     the finding or the budget can't decide it; fewer than three seeds in common; a
                    measure is missing; or the effect is smaller than the smallest that the noise
                    can tell (``train.findings.statistics``)
    still rising    the two outcomes of the effect change their order within the last third of
                    training (means over seeds, at the recorded steps)
    doesn't hold    a test of the direction fails
    holds in direction    a test of the magnitude fails
    holds

The magnitude of a claim that has no test of it is "no number to hold to".

The noise of an effect is the largest of the standard deviations of its two sides and of the same
measures in the noise finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import pandas as pd

from train.findings.base import AtLeast, Claim, Of
from train.findings.statistics import smallest_effect
from train.findings.store import Results

MIN_SEEDS = 3
"""Nothing is called reproduced on fewer."""

LAST_SHARE = 1 / 3
"""Share of training, the last one, in which the order must be stable."""


class Verdict(StrEnum):
    holds = "holds"
    in_direction = "holds in direction"
    fails = "doesn't hold"
    undecided = "not decided"
    rising = "still rising"
    no_number = "no number to hold to"


class Judged(NamedTuple):
    """A claim's verdicts. reason: what decided it; seeds: in common to its arms. effect, tellable:
    the difference of means and the smallest that can be told, nan where there is none."""

    verdict: Verdict
    direction: Verdict
    magnitude: Verdict
    reason: str
    seeds: int
    effect: float = math.nan
    tellable: float = math.nan


HAS_BOS = {"text": False, "eos_text": False, "bos_text": True}
"""Whether an input has a BOS, of those that models trained with one and without one know apart."""

Noise = dict[str, tuple[float, int]]
"""By measure: the standard deviation over seeds of the baseline, and how many there were."""


def noise_of(results: Results) -> Noise:
    """Of the noise finding: of each measure the arm with the largest spread, of text with or
    without a BOS only the arm that was trained with such: what a model does with a BOS that it
    doesn't know, or without the one that it knows, varies as no baseline does."""
    noise: Noise = {}
    for arm, seeds in results.records.items():
        knows = {one.made_by.get("trained_with_bos") for one in seeds.values()}
        for measure in sorted({name for one in seeds.values() for name in one.values}):
            has_bos = HAS_BOS.get(measure.partition("/")[0].removeprefix("row_"))
            if has_bos is not None and (not has_bos) in knows:
                continue
            spread = results.spread(Of(arm, measure))
            if spread is not None and spread[0] > noise.get(measure, (-1.0, 0))[0]:
                noise[measure] = spread
    return noise


def noise_like(measure: str, noise: Noise) -> tuple[float, int] | None:
    """Of the baseline's measure of that name; prompts that are written into have those of ``text``,
    into which the noise finding writes nothing. None if it has none."""
    if measure not in noise:
        measure = measure.replace("written/", "text/", 1)
    return noise.get(measure)


def judge(claim: Claim, results: Results, noise: Noise) -> Judged:
    """The verdicts of a claim; the same for the same records.

    Records from before one of its measures was taken are left out.
    """
    if results.finding.own_experiment:
        # That of the baseline isn't its.
        noise = {}
    every, sides = results, [side for test in claim.tests for side in test.sides]
    results = every.with_measures(sides)
    counts = [set(results.records.get(arm, {})) for arm in claim.arms]
    seeds = len(set.intersection(*counts)) if counts else 0

    def same(verdict: Verdict, reason: str, *numbers: float) -> Judged:
        magnitude = verdict if claim.magnitude else Verdict.no_number
        return Judged(verdict, verdict, magnitude, reason, seeds, *numbers)

    budget = results.budget
    if not budget.decides:
        return same(Verdict.undecided, f"budget {budget.name}: {budget.meant_for}")
    if results.finding.undecided is not None and budget.name != "paper":
        return same(Verdict.undecided, results.finding.undecided)
    if seeds < MIN_SEEDS:
        told = f"{seeds} of the {MIN_SEEDS} seeds that it takes"
        if lacking := next((side for side in sides if every.lacks(side)), None):
            told += f"; not every run has {lacking}"
        return same(Verdict.undecided, told)
    if told := results.other_data(claim.arms):
        return same(Verdict.undecided, told)
    if missing := _missing(claim.direction, claim.effect or (), results):
        # What no noise could make, and is known of every run, can fail without the rest.
        known = [test for test in claim.direction if not _missing([test], (), results)]
        if claim.effect is None and (reason := _failing(known, results)):
            return same(Verdict.fails, reason)
        return same(Verdict.undecided, f"not every run has {missing}")
    numbers: tuple[float, ...] = ()
    if claim.effect is not None:
        numbers = effect_of(claim.effect, results, noise)
        effect, tellable = numbers
        if abs(effect) < tellable:
            return same(Verdict.undecided, told_effect(claim, effect, tellable), *numbers)
        if (step := unstable_from(claim.effect, results)) is not None:
            return same(Verdict.rising, f"the order still changed after step {step:,}", *numbers)
    if reason := _failing(claim.direction, results):
        return same(Verdict.fails, reason, *numbers)
    if missing := _missing(claim.magnitude, (), results):
        verdicts = (Verdict.in_direction, Verdict.holds, Verdict.undecided)
        return Judged(*verdicts, f"not every run has {missing}", seeds, *numbers)
    if reason := _failing(claim.magnitude, results):
        verdicts = (Verdict.in_direction, Verdict.holds, Verdict.fails)
        return Judged(*verdicts, reason, seeds, *numbers)
    reason = told_effect(claim, *numbers) if numbers else ""
    return same(Verdict.holds, reason, *numbers)


def told_effect(claim: Claim, effect: float, tellable: float) -> str:
    """The difference of means in what it is of, beside what could be told."""
    assert claim.effect is not None
    measures = " - ".join(dict.fromkeys(side.measure for side in claim.effect))
    return f"effect {effect:.3g} in {measures}, smallest that can be told {tellable:.3g}"


def effect_of(pair: tuple[Of, Of], results: Results, noise: Noise) -> tuple[float, float]:
    """The difference of the means, and the smallest that the noise can tell."""
    left, right = (results.known(side) for side in pair)
    spreads = [results.spread(side) for side in pair]
    spreads += [noise_like(side.measure, noise) for side in pair]
    sd, count = max(filter(None, spreads))
    degrees = max(count - 1, len(left) + len(right) - 2)
    return float(np.mean(left) - np.mean(right)), smallest_effect(
        sd, degrees, len(left), len(right)
    )


def unstable_from(pair: tuple[Of, Of], results: Results) -> int | None:
    """The last recorded step in the last third of training at which the order was another than at
    the end; None if it was stable, or one side has no curve."""
    curves = [results.curve(side) for side in pair]
    if any(curve is None for curve in curves):
        return None
    left, right = curves
    both = pd.concat([left, right], axis=1, join="inner")
    difference = both.iloc[:, 0] - both.iloc[:, 1]
    late = difference[difference.index >= (1 - LAST_SHARE) * difference.index.max()]
    other = late[np.sign(late) != np.sign(late.iloc[-1])] if len(late) else late
    return int(other.index[-1]) if len(other) else None


def _missing(tests: Iterable[AtLeast], others: Iterable[Of], results: Results) -> Of | None:
    """The first side that isn't a number in every run of its arm."""
    sides = [side for test in tests for side in test.sides]
    for side in (*sides, *others):
        if len(results.known(side)) < len(results.records[side.arm]):
            return side
    return None


def _failing(tests: Iterable[AtLeast], results: Results) -> str:
    """The first test that fails, with the first seeds that don't agree; empty if all hold."""
    for test in tests:
        left = results.values(test.left)
        right = {seed: 0.0 for seed in left} if test.right is None else results.values(test.right)
        pairs = [(a, b) for a in left for b in right if test.every or a == b]
        for a, b in sorted(pairs):
            if not test.holds(left[a], right[b]):
                beside = f" against {right[b]:.3g} of seed {b}" if test.right is not None else ""
                return f"not so ({test}): {left[a]:.3g} of seed {a}{beside}"
    return ""
