"""What findings cost at a budget, and whether it can tell the effects that they are about."""

from __future__ import annotations

import math
from pathlib import Path

from train.findings import FINDINGS
from train.findings.base import PRIMARY, Claim, Finding
from train.findings.budgets import Budget, preset_of, seeds_of, tokens_of
from train.findings.page import stored_noise
from train.findings.statistics import smallest_effect
from train.findings.store import Results, stored_results
from train.findings.table import markdown
from train.findings.verdicts import MIN_SEEDS, Noise, judge, noise_like
from train.report.curves import short_count

RATE_OF = {PRIMARY: "rate_030"}
"""The measure in whose unit the papers' effects are, by the end of the name of ours."""


def list_lines(budget: Budget, folder: Path) -> list[str]:
    """A table of the findings: cost in runs, time and tokens, and what can be told."""
    noise = stored_noise(budget, folder)
    rows = [_row(finding, budget, folder, noise) for finding in FINDINGS.values()]
    header = [
        "finding",
        "claim's source",
        "arms x seeds",
        "stored",
        "time",
        "tokens",
        "can it tell?",
    ]
    return [
        f"budget {budget.name}: {budget.meant_for}",
        "",
        *markdown(header, rows),
        "",
        "Arms that several findings have are run once. Time: of the stored runs, by the "
        "token; else an estimate.",
    ]


def _row(finding: Finding, budget: Budget, folder: Path, noise: Noise) -> list[str]:
    results = stored_results(finding, budget, folder)
    seeds, arms = len(seeds_of(finding, budget)), finding.arms_of(budget.name)
    took = [run.seconds for run in results.runs]
    # Of the noise finding's arms more seeds may be stored than are asked for here.
    planned = sum(seed < seeds for arm in results.records.values() for seed in arm)
    preset = preset_of(finding, budget)
    tokens = sum(tokens_of(preset, arm.overrides) for arm in arms)
    # By the token: arms differ in length, and not all of them may have run.
    seconds_a_token = budget.seconds / tokens_of(preset)
    if took:
        seconds_a_token = sum(took) / sum(run.values["tokens"] for run in results.runs)
    seconds = seconds_a_token * tokens
    return [
        finding.name,
        finding.source,
        f"{len(arms)} x {seeds}",
        f"{planned}/{len(arms) * seeds}",
        f"{'' if took else 'about '}{_span(seeds * seconds)}",
        short_count(seeds * tokens),
        resolution(finding, budget, seeds, noise) + _seen(results, noise),
    ]


def resolution(finding: Finding, budget: Budget, seeds: int, noise: Noise) -> str:
    """Whether the effects that the paper reports are larger than the smallest that can be told."""
    claims = finding.claims_of(budget.name)
    effects = [c for c in claims if c.effect is not None and c.paper_effect is not None]
    if not budget.decides:
        return "no: checks the machinery"
    if finding.undecided is not None and budget.name != "paper":
        return f"no: {finding.undecided}"
    if finding.name == "noise":
        return "it measures what can be told"
    if seeds < MIN_SEEDS:
        return f"no: fewer than {MIN_SEEDS} seeds"
    if not effects:
        return "its claims aren't about a difference"
    if finding.own_experiment:
        return "by its own runs' noise"
    if not noise:
        return "unknown: run noise first"
    smallest = [(claim.paper_effect, _smallest(claim, RATE_OF, seeds, noise)) for claim in effects]
    known = [(effect, tellable) for effect, tellable in smallest if tellable is not None]
    if not known:
        return "unknown: noise has other measures"
    enough = sum(effect > tellable for effect, tellable in known)
    worst = max(tellable for _, tellable in known)
    told = (
        f"{enough} of {len(effects)} effects of the paper's size; "
        f"the smallest that can be told is {worst:.2g} in rate"
    )
    masses = [_smallest(claim, {}, seeds, noise) for claim in effects if _is_of_mass(claim)]
    known_masses = [mass for mass in masses if mass is not None]
    return f"{told}, {max(known_masses):.2g} in excess mass" if known_masses else told


def _seen(results: Results, noise: Noise) -> str:
    """How many of the effects that the stored runs have can be told from none; "" without any.

    Ours may be far smaller than a paper's: what hardly sinks has little to lose.
    """
    claims = results.finding.claims_of(results.budget.name)
    told = [judge(claim, results, noise) for claim in claims if claim.effect]
    known = [one for one in told if not math.isnan(one.effect)]
    large = sum(abs(one.effect) >= one.tellable for one in known)
    return f"; of {len(known)} measured here {large} can be told from none" if known else ""


def _is_of_mass(claim: Claim) -> bool:
    return all(side.measure.endswith(f"/{PRIMARY}") for side in claim.effect or ())


def _smallest(claim: Claim, instead: dict[str, str], seeds: int, noise: Noise) -> float | None:
    """The smallest effect of a claim's two measures, or of those named ``instead``; None if the
    noise has neither."""
    spreads = []
    for side in claim.effect or ():
        place, _, name = side.measure.partition("/")
        spreads.append(noise_like(f"{place}/{instead.get(name, name)}", noise))
    known = [spread for spread in spreads if spread is not None]
    if not known:
        return None
    sd, count = max(known)
    return smallest_effect(sd, max(count - 1, 2 * seeds - 2), seeds, seeds)


def _span(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{math.ceil(seconds)} s"
