"""A finding's outcome as plain values, and as text: ours beside the paper's, and the verdicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from train.findings.base import Column, Finding, Of
from train.findings.budgets import Budget
from train.findings.measures import rounded
from train.findings.statistics import smallest_effect
from train.findings.store import Results
from train.findings.verdicts import Judged, Noise, judge, noise_of
from train.report.curves import short_count

HEADS = {"rate_030": "heads_030"}
"""Measure whose heads are counted beside it, by the end of its name."""

NOISE_SEEDS = (3, 5)
"""Seeds an arm for which the noise finding tells the smallest effect."""


def outcome(results: Results, noise: Noise) -> dict[str, Any]:
    """Everything that is said of a finding, as JSON: what ``docs/findings/<name>.json`` holds.

    The same for the same records and noise.
    """
    finding, budget = results.finding, results.budget
    runs = results.runs
    is_of_layers = any(panel.kind == "layers" for panel in finding.panels)
    own_noise = noise_of(results) if finding.name == "noise" else noise
    return {
        "finding": finding.name,
        "budget": budget.name,
        "seeds": {arm: sorted(seeds) for arm, seeds in results.records.items()},
        "table": [_row(results, column) for column in finding.columns],
        "claims": [
            {"says": claim.says, "criterion": criterion(claim), "added": claim.added}
            | _told(judge(claim, results, noise))
            for claim in finding.claims_of(budget.name)
        ],
        "onsets": _onsets(results) if is_of_layers else [],
        "layers": _layers(results) if is_of_layers else [],
        "spread": _spread(own_noise, finding) if finding.name == "noise" else {},
        "cost": {
            "runs": len(runs),
            "seconds": round(sum(run.seconds for run in runs), 1),
            "tokens": int(sum(run.values["tokens"] for run in runs)),
            "devices": sorted({str(run.made_by["device"]) for run in runs}),
        },
        "mixed_data": [
            arm
            for arm, seeds in results.records.items()
            if len({run.made_by.get("data_sha256") for run in seeds.values()}) > 1
        ],
    }


def criterion(claim) -> dict[str, list[str]]:
    """The tests of a claim in words."""
    return {
        "direction": [str(test) for test in claim.direction],
        "magnitude": [str(test) for test in claim.magnitude],
    }


def _told(judged: Judged) -> dict[str, Any]:
    told = judged._asdict()
    numbers = {name: rounded(told[name], 4) for name in ("effect", "tellable")}
    return (
        {name: str(value) for name, value in told.items() if name != "seeds"}
        | numbers
        | {"seeds": judged.seeds}
    )


def _row(results: Results, column: Column) -> dict[str, Any]:
    """A column of the table: by arm mean, standard deviation, values by seed, the paper's number,
    and heads over 0.3 of all."""
    arms = {}
    for arm in results.finding.arms_of(results.budget.name):
        seeds = results.values(Of(arm.name, column.measure))
        values = [value for value in seeds.values() if math.isfinite(value)]
        told: dict[str, Any] = {"values": [rounded(value, 4) for value in seeds.values()]}
        if values:
            told["mean"] = rounded(float(np.mean(values)), 4)
        if len(values) > 1:
            told["sd"] = rounded(float(np.std(values, ddof=1)), 4)
        if column.measure in arm.paper:
            told["paper"] = arm.paper[column.measure]
        place, _, name = column.measure.rpartition("/")
        if name in HEADS:
            heads = results.known(Of(arm.name, f"{place}/{HEADS[name]}"))
            total = results.known(Of(arm.name, "heads"))
            told["heads"] = [f"{h:.0f}/{n:.0f}" for h, n in zip(heads, total, strict=False)]
        arms[arm.name] = told
    return {"measure": column.measure, "title": column.title, "arms": arms}


ERRORS = ("onset_step", "spacing_step", "low_step", "high_step", "sink_heads")
"""What is told of the onset of every run."""


def _onsets(results: Results) -> list[dict[str, Any]]:
    """By arm and seed: the onset in steps and its two errors, None where a run has none."""
    return [
        {"arm": arm, "seed": seed}
        | {name: rounded(run.values.get(f"onset/{name}", math.nan), 6) for name in ERRORS}
        for arm, seeds in results.records.items()
        for seed, run in seeds.items()
    ]


def _layers(results: Results) -> list[dict[str, Any]]:
    """By arm and layer: heads past their onset, of how many, all seeds together, and the step of
    the layer's first onset by seed (None without one); layers with an onset in more seeds come
    first, then those whose mean is earlier."""
    rows = []
    for arm, seeds in results.records.items():
        heads = [
            {"seed": seed, "layer": layer, "onset": math.nan if onset is None else onset}
            for seed, record in seeds.items()
            for layer, _, onset in record.heads
        ]
        if not heads:
            continue
        table = pd.DataFrame(heads)
        first = table.pivot_table(
            index="layer", columns="seed", values="onset", aggfunc="min", dropna=False
        )
        by_layer = table.groupby("layer")["onset"]
        order = pd.DataFrame({"without": first.isna().sum(axis=1), "mean": first.mean(axis=1)})
        for layer in order.sort_values(["without", "mean"], kind="stable").index:
            rows.append(
                {
                    "arm": arm,
                    "layer": int(layer),
                    "heads": f"{by_layer.count()[layer]}/{by_layer.size()[layer]}",
                    "first_onset": [rounded(step, 6) for step in first.loc[layer]],
                }
            )
    return rows


def _spread(noise: Noise, finding: Finding) -> dict[str, Any]:
    """By measure: the larger standard deviation of the arms, and what it can tell."""
    kept = {column.measure for column in finding.columns}
    return {
        measure: {
            "sd": rounded(sd, 4),
            "seeds": count,
            "smallest_effect": {
                str(n): rounded(smallest_effect(sd, max(count - 1, 2 * n - 2), n, n), 3)
                for n in NOISE_SEEDS
            },
        }
        for measure, (sd, count) in noise.items()
        if measure in kept
    }


def lines_of(finding: Finding, budget: Budget, told: dict[str, Any]) -> list[str]:
    """The outcome as Markdown, which reads well in a terminal too."""
    lines = []
    for number in dict.fromkeys(column.table for column in finding.columns):
        lines += [*_table(finding, budget, told, number), ""]
    lines.append(f"Mean ± standard deviation over seeds{_brackets(told)}; {finding.aggregation}.")
    if told["mixed_data"]:
        lines += ["", f"Seeds that saw other data: of {', '.join(told['mixed_data'])}."]
    if told["onsets"]:
        lines += ["", *_onset_lines(told["onsets"])]
    if told["layers"]:
        lines += ["", *_layer_lines(told["layers"])]
    if told["spread"]:
        lines += ["", *_spread_lines(told["spread"])]
    if told["claims"]:
        rows = [
            [
                *(
                    claim["says"] + _added(claim),
                    claim["verdict"],
                    claim["direction"],
                    claim["magnitude"],
                ),
                *(str(claim["seeds"]), claim["reason"]),
            ]
            for claim in told["claims"]
        ]
        header = ["claim", "verdict", "direction", "magnitude", "seeds", "why"]
        lines += ["", *markdown(header, rows)]
    cost = told["cost"]
    if cost["runs"]:
        lines += [
            "",
            f"{cost['runs']} runs, {cost['seconds']:,.0f} s, {short_count(cost['tokens'])} tokens, "
            f"{', '.join(cost['devices'])}.",
        ]
    return lines


def _table(finding: Finding, budget: Budget, told: dict[str, Any], number: int) -> list[str]:
    """The table of that number: arms by columns, ours beside the paper's."""
    columns = {column.measure: column for column in finding.columns if column.table == number}
    shown = [row for row in told["table"] if row["measure"] in columns]
    paper = [row for row in shown if any("paper" in cell for cell in row["arms"].values())]
    header = ["arm", "seeds"]
    for row in shown:
        header += [row["title"], *(["paper"] if row in paper else [])]
    rows = []
    for arm in (arm.name for arm in finding.arms_of(budget.name)):
        cells = [arm, str(len(told["seeds"].get(arm, [])))]
        for row in shown:
            cell, percent = row["arms"][arm], columns[row["measure"]].percent
            cells.append(cell_text(cell, percent))
            if row in paper:
                cells.append(paper_text(cell["paper"], percent) if "paper" in cell else "")
        rows.append(cells)
    return markdown(header, rows)


def _brackets(told: dict[str, Any]) -> str:
    """What the cells' brackets mean, of those that there are."""
    cells = [cell for row in told["table"] for cell in row["arms"].values() if "mean" in cell]
    text = ""
    if any(cell.get("heads") for cell in cells):
        text += "; in brackets the heads whose mean is above 0.3, of all, in the seeds with the "
        text += "fewest and the most"
    if any(None in cell["values"] for cell in cells):
        text += "; (n of m): so many of the runs have it"
    return text


def _added(claim: dict[str, Any]) -> str:
    return " (criterion added later)" if claim["added"] else ""


def _onset_lines(onsets: list[dict[str, Any]]) -> list[str]:
    header = ["arm", "seed", "onset, step", "after record", "95 % over heads", "heads past theirs"]
    rows = []
    for row in onsets:
        onset, spacing, low, high, heads = (row[name] for name in ERRORS)
        ends = ["–"] * 3
        if onset is not None:
            last = "after the end" if high is None else f"{high:,}"
            first = "after the end" if low is None else f"{low:,}"
            ends = [f"{onset:,}", f"{onset - spacing:,}", f"{first} to {last}"]
        rows.append([row["arm"], str(row["seed"]), *ends, "–" if heads is None else str(heads)])
    return markdown(header, rows)


def _layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            *(row["arm"], str(row["layer"]), row["heads"]),
            ", ".join("–" if step is None else f"{step:,}" for step in row["first_onset"]),
        ]
        for row in layers
    ]
    header = ["arm", "layer", "heads past their onset", "first onset by seed, step"]
    order = "Layers with an onset in more seeds come first, then those whose mean is earlier."
    return [*markdown(header, rows), "", order]


def _spread_lines(spread: dict[str, Any]) -> list[str]:
    rows = [
        [measure, f"{one['sd']:.3g}", str(one["seeds"])]
        + [f"{one['smallest_effect'][str(n)]:.3g}" for n in NOISE_SEEDS]
        for measure, one in spread.items()
    ]
    told = [f"smallest effect, {n} seeds an arm" for n in NOISE_SEEDS]
    return markdown(["measure", "standard deviation", "seeds", *told], rows)


def cell_text(cell: dict[str, Any], percent: bool) -> str:
    """``12.4 ± 0.8 % (5 to 7/48)``, the heads' smallest and largest number; a dash for what isn't
    known."""
    if "mean" not in cell:
        return "–"
    scale = 100 if percent else 1
    digits = 1 if percent else _digits(cell["mean"])
    text = f"{scale * cell['mean']:,.{digits}f}"
    if "sd" in cell:
        text += f" ± {scale * cell['sd']:,.{digits}f}"
    text += " %" if percent else ""
    unknown = sum(value is None for value in cell["values"])
    if unknown:
        text += f" ({len(cell['values']) - unknown} of {len(cell['values'])})"
    if not cell.get("heads"):
        return text
    counts, totals = zip(*(told.split("/") for told in cell["heads"]), strict=True)
    ends = sorted({min(counts, key=int), max(counts, key=int)}, key=int)
    return f"{text} ({' to '.join(ends)}/{totals[0]})"


def paper_text(value: float, percent: bool) -> str:
    """A paper's number."""
    return f"{100 * value:.2f} %" if percent else f"{value:g}"


def _digits(mean: float) -> int:
    return 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 0


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, its columns aligned; a row that is too short is filled up."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
