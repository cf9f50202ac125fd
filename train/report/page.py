"""One self-contained HTML page: tables and figures of runs, with plotly.js in it once."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from train.report import detail, figures
from train.report.gather import Arm, ReportRun
from train.report.tables import (
    UNTRAINED,
    arm_table,
    onset_table,
    provenance_table,
    settings_table,
)

HERE = Path(__file__).parent

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; form-action 'none'"
)
"""What the browser lets the page do: nothing that needs a network."""

AXES = {
    "step log": "steps, logarithmic",
    "step linear": "steps, linear",
    "tokens log": "tokens, logarithmic",
    "tokens linear": "tokens, linear",
}

NOTES = {
    "mass": "mean attention that the row's first key gets from the first 64 queries, itself "
    "included, over rows, heads and layers; in training unless held-out prompts are named",
    "excess mass": "mass minus that of a head which attends uniformly to what it sees",
    "heads > 0.3": "heads whose mean alpha in the last record is above 0.3, of all heads, by seed",
    "rate": "share of (row, layer, head) with alpha above 0.3: threshold, then average",
    "onset": "first record from which on the excess mass stays at or above half of its final "
    "value and more than two heads stay above 0.3 in at least half of the samples; minus the "
    "distance to the record before; in brackets 95 % of draws of other heads; censored runs have "
    "none up to the step after >",
    "canonical loss": "held-out text, the same labels in every run with the same corpus, tokenizer "
    "and context",
    "loss of removing BOS": "loss on 64-token prompts of text minus that on BOS and the first 63, "
    f"same labels; {UNTRAINED}: the model never saw a BOS, so the figure says nothing of its "
    "removal",
    "cost of hiding position 0": "what the loss on 64-token prompts rises by when position 0 is "
    "hidden from all later queries, at the last probed checkpoint; prompts begin with a BOS where "
    "the model was trained with one",
    "at ... of ... tokens": "a seed that hasn't reached its last step: the means, ranges and "
    "table row of its arm end at the last step that all its seeds have, onsets are of each seed's "
    "own curve",
    "+ ... more": "settings in which an arm differs too; the table of arms has them all",
    "proxy": "share of weights that no softmax made; not to be compared with probabilities",
}


def render(runs: Sequence[ReportRun], arms: Sequence[Arm]) -> str:
    """The page; the same for the same runs."""
    by_arm = {
        "excess_mass": figures.excess_mass(arms),
        "probe_excess": figures.probe_excess(arms),
        "kept_excess": figures.kept_excess(arms),
        "mass": figures.mass(arms),
        "rate": figures.rate(arms),
        "canonical_loss": figures.canonical_loss(arms),
        "mass_against_loss": figures.mass_against_loss(arms),
        "norm_ratios": figures.norm_ratios(arms),
    }
    by_arm = {name: figure for name, figure in by_arm.items() if figure is not None}
    by_run = {
        run.name: {"head_maps": detail.head_maps(run), "norms_by_layer": detail.norms_by_layer(run)}
        for run in runs
    }
    by_run = {name: both for name, both in by_run.items() if any(both.values())}
    count = f"{_counted(len(runs), 'run')} in {_counted(len(arms), 'arm')}"
    experiments = ", ".join(dict.fromkeys(run.run.experiment for run in runs))
    body = "\n".join(
        [
            f"<h1>Attention sinks: {escape(experiments)}</h1>",
            f'<p class="soft">{count}. A line is an arm’s mean over its seeds, the band their '
            "range. Click a name in the legend to hide or show it in all figures, twice to see "
            "it alone.</p>",
            _arms_section(by_arm, runs, arms),
            _run_section(list(by_run)),
            "<h2>Onset by run</h2>",
            onset_table(runs, arms),
            "<h2>Settings in which the runs differ</h2>",
            settings_table(runs),
            "<h2>Provenance</h2>",
            provenance_table(runs),
            "<h2>What the words mean</h2>",
            _notes(),
        ]
    )
    return Template((HERE / "page.html").read_text()).substitute(
        policy=POLICY,
        title=escape(experiments),
        style=(HERE / "page.css").read_text(),
        body=body,
        figures=_json({name: _plain(figure) for name, figure in by_arm.items()}),
        details=_json(
            {
                name: {part: _plain(figure) for part, figure in both.items()}
                for name, both in by_run.items()
            }
        ),
        plotly=get_plotlyjs(),
        script=(HERE / "page.js").read_text(),
    )


def _arms_section(by_arm: dict, runs: Sequence[ReportRun], arms: Sequence[Arm]) -> str:
    def place(name: str) -> str:
        return f'<div class="figure" id="{name}"></div>' if name in by_arm else ""

    options = "".join(f'<option value="{value}">{text}</option>' for value, text in AXES.items())
    missing = [run.name for run in runs if run.first.empty]
    note = ""
    if missing:
        note = f'<p class="soft">No record of the first key in: {escape(", ".join(missing))}.</p>'
    untrained = ""
    if by_arm.keys() & {"probe_excess", "kept_excess"} and not all(arm.knows_bos for arm in arms):
        untrained = f'<p class="soft">Dotted under BOS + text: {UNTRAINED}.</p>'
    return f"""<h2>Arms</h2>
<div class="controls"><label>x axis <select id="axis">{options}</select></label></div>
{place("excess_mass")}{note}
{arm_table(arms)}
<div class="pair">{place("mass")}{place("rate")}</div>
{place("probe_excess")}{place("kept_excess")}{untrained}
<div class="pair">{place("canonical_loss")}{place("mass_against_loss")}</div>
{place("norm_ratios")}"""


def _run_section(names: list[str]) -> str:
    if not names:
        return ""
    # Without a value the browser takes the text, white space collapsed.
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    return f"""<h2>One run in detail</h2>
<div class="controls"><label>run <select id="run">{options}</select></label></div>
<div class="figure" id="head_maps"></div>
<div class="figure" id="norms_by_layer"></div>"""


def _notes() -> str:
    return "<dl>" + "".join(f"<dt>{n}</dt><dd>{escape(t)}</dd>" for n, t in NOTES.items()) + "</dl>"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(figure: go.Figure | None) -> dict | None:
    return None if figure is None else json.loads(figure.to_json())


def _json(value: object) -> str:
    """JSON that can stand inside a script element: "<" occurs in strings only."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c")
