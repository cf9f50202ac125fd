"""What a run prints and writes: a block as each case ends, two tables and the claims, the JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kernels.bench.claims import BASIC, FULL, OFF, Record, Results, claims
from kernels.bench.contenders import CONTENDERS

SHORT_NAMES = {
    "sinklab": "off",
    "sinklab+stats": "basic",
    "sinklab+full": "full",
    "flash_varlen": "varlen",
    "materialised": "written",
    "second_pass": "2nd pass",
}
"""Column heads; other contenders go by their own name."""

RATIOS = {
    "b/cudnn": (BASIC, "cudnn"),
    "flash/b": ("flash", BASIC),
    "flex/b": ("flex", BASIC),
    "varlen/b": ("flash_varlen", BASIC),
    "b/off": (BASIC, OFF),
    "full/off": (FULL, OFF),
}
"""Column heads of the second table: total time of the first contender over the second's."""


def case_block(label: str, records: list[Record]) -> str:
    """One case in full: a line a contender, milliseconds with the distance between quartiles."""
    lines = [
        f"{label}",
        f"  {'':13}{'variant':>13}{'forward':>10}{'backward':>10}{'total':>10}{'+-':>8}"
        f"{'TFLOP/s':>9}{'peak':>7}{'MiB':>9}  timed by",
    ]
    for record in records:
        memory = record["peak_mib"]
        lines.append(
            f"  {record['implementation']:13}{record['variant']:>13}{record['forward_ms']:>10.3f}"
            f"{record['backward_ms']:>10.3f}{record['total_ms']:>10.3f}"
            f"{record['spread_ms']['total']:>8.3f}{record['tflops']:>9.1f}"
            f"{_number(record['share_of_peak'], 7, 3)}{_number(memory, 9, 0)}"
            f"  {record['timed_by']}"
        )
    return "\n".join(lines)


def summary(records: list[Record]) -> str:
    """Total times, ratios and claims; a whole preset stays below 12,000 characters."""
    results = Results(records)
    measured = {record["implementation"] for record in records}
    names = [name for name in CONTENDERS if name in measured]
    width = max((len(_label(case)) for case in results.cases), default=0) + 1

    heads = "".join(f"{SHORT_NAMES.get(name, name):>9}" for name in names)
    lines = ["total ms", f"{'':{width}}{heads}"]
    for case, by_name in results.cases.items():
        totals = (by_name[name]["total_ms"] if name in by_name else None for name in names)
        cells = "".join(_number(total, 9, 3) for total in totals)
        lines.append(f"{_label(case):{width}}{cells}")

    heads = "".join(f"{name:>9}" for name in [*RATIOS, "TFLOP/s", "of peak"])
    lines += ["", "ratios of total time; b = basic", f"{'':{width}}{heads}"]
    for case, by_name in results.cases.items():
        cells = "".join(_number(results.ratio(case, *pair), 9, 3) for pair in RATIOS.values())
        basic = by_name.get(BASIC, {})
        cells += _number(basic.get("tflops"), 9, 1) + _number(basic.get("share_of_peak"), 9, 3)
        lines.append(f"{_label(case):{width}}{cells}")
    return "\n".join([*lines, "", claims_block(records)])


def claims_block(records: list[Record]) -> str:
    """Each target with what was measured."""
    lines = ["claims"]
    for claim in claims(records):
        value = "-" if claim.measured is None else f"{claim.measured:.4g}"
        line = f"{claim.what:34}{claim.bound:>22}{value:>10}  {claim.status:13}{claim.where}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def write_json(path: Path, environment: dict[str, Any], records: list[Record]) -> None:
    """The list of a benchmark of record, whole or not at all: the environment, then the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) for one in [{"environment": environment}, *records]]
    part = path.with_name(f"{path.name}.part")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    os.replace(part, path)


def _label(case: tuple) -> str:
    shape, groups, mask, _ = case
    grouped = "" if groups == shape[1] else f" G{groups}"
    return f"{','.join(map(str, shape))}{grouped} {mask}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
