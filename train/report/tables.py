"""The report's tables: of arms, of onsets, of settings, of provenance."""

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from train.arms import differences
from train.onset import RunOnset
from train.report.curves import short_count
from train.report.gather import Arm, ReportRun

UNTRAINED = "BOS untrained"
"""Mark of a figure that rests on a BOS which the model never saw."""


class Html(str):
    """Text that is HTML already."""


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """An HTML table; cells are escaped but for ``Html``, line breaks in them kept."""

    def cell(value: object) -> str:
        return value if isinstance(value, Html) else escape(str(value)).replace("\n", "<br>")

    head = "".join(f"<th>{cell(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: float, digits: int = 3) -> str:
    """``0.062``; a dash for what isn't known."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def mean_with_range(values: Sequence[float], digits: int = 3) -> str:
    """``0.062 (0.060 to 0.064)`` of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    mean = number(float(np.mean(known)), digits)
    if len(known) == 1:
        return mean
    return f"{mean}\n({number(min(known), digits)} to {number(max(known), digits)})"


def onset_text(onset: RunOnset | None) -> str:
    """``1,200 -100 [1,100, 1,300]``: step, distance to the record before, interval; ``> 2,000``."""
    if onset is None:
        return "–"
    if onset.onset is None:
        return f"> {onset.censored_at.step:,}"
    return f"{onset.onset.step:,} −{onset.spacing.step:,} {_interval(onset)}"


def _interval(onset: RunOnset) -> str:
    low, high = (f"{end.step:,}" if end else "> end" for end in (onset.low, onset.high))
    return f"[{low}, {high}]"


def arm_table(arms: Sequence[Arm]) -> str:
    """One row an arm: what came out, mean and range over seeds at their last common step."""
    header = (
        *("arm", "seeds", "tokens", "mass, T = 64", "uniform", "heads > 0.3"),
        *("rate", "onset, step", "canonical loss, nats", "loss of removing BOS, nats"),
    )
    costs = [mean_with_range(arm.cost_of_hiding()) for arm in arms]
    rows = [_arm_row(arm) for arm in arms]
    # Only of runs whose checkpoints were probed.
    if any(cost != "–" for cost in costs):
        header = (*header, "cost of hiding position 0, nats")
        rows = [[*row, cost] for row, cost in zip(rows, costs, strict=True)]
    return html_table(header, rows, "arms")


def _arm_row(arm: Arm) -> list[object]:
    swatch = f'<span class="swatch" style="background:{arm.colour}"></span>'
    behind = "".join(f'<br><span class="soft">{escape(told)}</span>' for told in arm.behind)
    heads = [run.sink_heads(arm.until) for run in arm.runs]
    tokens = max((run.run.tokens_per_step for run in arm.runs), default=0) * arm.until
    removal = mean_with_range(arm.bos_removal_loss())
    if not arm.knows_bos and removal != "–":
        removal = f"{removal}\n{UNTRAINED}"
    return [
        Html(swatch + escape(arm.name) + behind),
        ", ".join(run.seeds for run in arm.runs),
        short_count(tokens) if tokens else "–",
        mean_with_range(arm.last("sink/mass")),
        mean_with_range(arm.last("sink/baseline")).split("\n")[0],
        "\n".join(f"{over}/{total}" for over, total in filter(None, heads)) or "–",
        mean_with_range(arm.last("sink/rate_030")),
        "\n".join(onset_text(run.onset) for run in arm.runs),
        mean_with_range(arm.last("val/canonical_loss")),
        removal,
    ]


def onset_table(runs: Sequence[ReportRun], arms: Sequence[Arm]) -> str:
    """One row a run: its onset in every unit, or when it was censored."""
    header = (
        *("run", "arm", "onset, step", "95 % over heads, steps", "onset, tokens"),
        *("onset, sum of learning rates", "heads with onset", "final excess"),
    )
    return html_table(header, [_onset_row(run, arms[run.arm]) for run in runs])


def _onset_row(run: ReportRun, arm: Arm) -> list[object]:
    names = [run.name, arm.name]
    onset = run.onset
    if onset is None:
        return [*names, *["–"] * 6]
    heads = [f"{onset.sink_heads}/{onset.heads}", number(onset.final_excess)]
    if onset.onset is None:
        end = onset.censored_at
        return [
            *(*names, f"> {end.step:,}", "censored", f"> {short_count(end.tokens)}"),
            *(f"> {end.lr_sum:.3g}", *heads),
        ]
    at, spacing = onset.onset, onset.spacing
    censored = onset.censored_draws
    note = f"\n{censored:.0%} of the draws censored" if censored else ""
    return [
        *names,
        f"{at.step:,} −{spacing.step:,}",
        _interval(onset) + note,
        f"{short_count(at.tokens)} −{short_count(spacing.tokens)}",
        f"{at.lr_sum:.3g} −{spacing.lr_sum:.2g}",
        *heads,
    ]


def settings_table(runs: Sequence[ReportRun]) -> str:
    """The settings in which the runs differ, seeds last."""
    table = differences([run.run for run in runs])
    rows = [
        [run.name, *("–" if value is None else value for value in row)]
        for run, row in zip(runs, table.itertuples(index=False), strict=True)
    ]
    return html_table(["run", *table.columns], rows)


def provenance_table(runs: Sequence[ReportRun]) -> str:
    """Where each run's numbers come from."""
    header = ("run", "folder", "commit", "device", "torch", "seed / data seed", "data", "probe set")
    rows = []
    for run in runs:
        told = run.run.provenance
        git = told.get("git") or {}
        commit = git.get("commit", "unknown")[:12] + (" + changes" if git.get("dirty") else "")
        data = (told.get("data") or {}).get("sha256", "unknown")[:12]
        rows.append(
            [
                *(run.name, run.run.path, commit, told.get("device", "unknown")),
                (told.get("versions") or {}).get("torch", "unknown"),
                " / ".join(map(str, run.run.seeds)),
                data,
                ", ".join(name[:12] for name in run.probe_sets) or "none",
            ]
        )
    return html_table(header, rows)
