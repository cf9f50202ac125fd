"""What is written down: of each finding its outcome, figure and data, and docs/findings.md.

    <folder>/<name>.json    table, verdicts, cost (``train.findings.table.outcome``)
    <folder>/<name>.png     the figure; <name>.csv: every point of it
    <folder>.md             half a page a finding, of those at budget ``minutes``

At another budget than ``minutes`` names end in it, ``packing.cpu.json``, and the page leaves them
out.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from data.files import write_atomically
from kernels.errors import UserError
from train.findings import FINDINGS
from train.findings.base import INPUTS, Finding
from train.findings.budgets import BUDGETS, Budget, pool_of
from train.findings.draw import draw, points_of
from train.findings.store import require_results, stored_results
from train.findings.table import lines_of, outcome
from train.findings.verdicts import Noise, noise_of

OF_RECORD = "minutes"
"""The budget whose results the page has."""


def stem(name: str, budget: Budget) -> str:
    """``packing``, or ``packing.cpu``."""
    return name if budget.name == OF_RECORD else f"{name}.{budget.name}"


def stored_noise(budget: Budget, folder: Path) -> Noise:
    """Of the stored runs of the noise finding; {} if there are none."""
    return noise_of(stored_results(FINDINGS["noise"], budget, folder))


def store_outcomes(name: str, budget: Budget, folder: Path) -> list[Path]:
    """Write the files of a finding from its stored runs, and anew what they change: other findings
    have its arms or rest on its noise, and the page has all. Returns the paths.

    Raises ``UserError`` if the finding has no stored run.
    """
    require_results(stored_results(FINDINGS[name], budget, folder), folder)
    noise = stored_noise(budget, folder)
    paths = []
    for finding in FINDINGS.values():
        base = folder / stem(finding.name, budget)
        path = base.with_name(f"{base.name}.json")
        if finding.name != name and not path.exists():
            continue
        results = stored_results(finding, budget, folder)
        content = json_bytes(outcome(results, noise))
        points = points_of(results).to_csv(index=False).encode()
        data = path.with_suffix(".csv")
        image = path.with_suffix(".png")
        old = [file.read_bytes() for file in (path, data) if file.exists()]
        if old == [content, points] and image.exists():
            continue
        buffer = io.BytesIO()
        # Without the version that drew it, which would differ for the same picture.
        draw(results).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        for file, new in ((path, content), (data, points), (image, buffer.getvalue())):
            write_atomically(file, new)
            paths.append(file)
    if budget.name == OF_RECORD:
        paths.append(folder.with_suffix(".md"))
        write_atomically(paths[-1], page(folder).encode())
    return paths


def json_bytes(told: dict[str, Any]) -> bytes:
    """The outcome as it is stored."""
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()


def stored_outcome(path: Path) -> dict[str, Any]:
    """Raises ``UserError`` for a file that is none."""
    try:
        told = json.loads(path.read_bytes())
        told["finding"], told["budget"], told["table"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} must be a finding's outcome, got {type(error).__name__}"
        ) from error
    return told


def page(folder: Path) -> str:
    """docs/findings.md of what is stored, and of nothing else."""
    budget = BUDGETS[OF_RECORD]
    lines = [
        "# Findings",
        "",
        "Central claims of the papers, tried again at small scale with several seeds. Written by",
        "`python -m scripts.reproduce NAME --store` from the runs in `docs/findings/runs/`; the",
        "criteria were written down before, unless one says when (`train/findings/`). Absolute",
        "percentages depend on scale: a verdict on the direction is about collapses, orderings and",
        "shifts, one on the magnitude about the bound that its criterion names. Five seeds an arm",
        "are planned, and eight of the baseline; a verdict is by those that were run, three at",
        "least, and says how many. In the figures a point is a seed, a bar or a line the mean, a",
        "band all seeds.",
    ]
    stored = [
        (finding, stored_outcome(path))
        for finding in FINDINGS.values()
        if (path := folder / f"{finding.name}.json").exists()
    ]
    lines += ["", "What a verdict takes, and the words: [README](../README.md#findings).", ""]
    lines += [f"- [{finding.title}](#{anchor(finding.title)})" for finding, _ in stored]
    for finding, told in stored:
        lines += ["", *_section(finding, budget, told, folder)]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """That of a heading on GitHub."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _section(finding: Finding, budget: Budget, told: dict[str, Any], folder: Path) -> list[str]:
    place = folder.name
    lines = [
        f"## {finding.title}",
        "",
        f"**Claim.** {finding.claim} ({finding.source}.)",
        "",
        f"**Setting.** {finding.setting[0].upper()}{finding.setting[1:]}.",
        "",
        *lines_of(finding, budget, told),
        "",
        f"![{finding.title}]({place}/{finding.name}.png)",
        "",
    ]
    if told["claims"]:
        lines += ["<details><summary>Criteria</summary>", ""]
        for claim in told["claims"]:
            direction = "; ".join(claim["criterion"]["direction"])
            magnitude = "; ".join(claim["criterion"]["magnitude"])
            lines.append(
                f"- {claim['says']}. Direction: {direction}."
                + (f" Magnitude: {magnitude}." if magnitude else "")
                + (f" Added {claim['added']}." if claim["added"] else "")
            )
        lines += ["", INPUTS, "", "</details>", ""]
    if finding.unknown:
        lines += [f"Not told by the paper: {'; '.join(finding.unknown)}.", ""]
    notes = folder / f"{finding.name}.md"
    if notes.exists():
        # What people have to say about it: why ours differs, and how that was tried.
        lines += [notes.read_text().strip(), ""]
    lines += [
        f"Data: `{place}/{finding.name}.csv`, runs in `{place}/runs/{pool_of(finding, budget)}/`.",
        f"Again: `python -m scripts.reproduce {finding.name} --budget {budget.name}`.",
    ]
    return lines
