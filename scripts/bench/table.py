"""Entries of the bench as a table and as JSON, one object a line."""

import json
import os
from pathlib import Path
from typing import Any

from kernels.errors import UserError, require

Entry = dict[str, Any]


def shown(entries: list[Entry]) -> str:
    """The entries of one preset as text."""
    one = entries[0]
    lines = [
        f"{one['preset']}: {one['micro_batches']} micro-batches of {one['rows']} rows of "
        f"{one['context']} tokens a step, vocabulary {one['vocab_size']:,}",
        f"{'':15}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'ms/step':>10}{'spread':>8}"
        f"{'of plain':>10}{'first step':>12}",
    ]
    for entry in entries:
        mfu, peak, ratio = entry["mfu"], entry["peak_gib"], entry["ratio_to_plain"]
        lines.append(
            f"{entry['implementation']:15}{entry['tokens_per_second']:10,}"
            f"{'-' if mfu is None else f'{mfu:.3f}':>8}{'-' if peak is None else f'{peak:.2f}':>10}"
            f"{entry['ms']:10.2f}{entry['spread_ms']:8.2f}"
            f"{'-' if ratio is None else f'{ratio:.3f}':>10}"
            f"{entry['seconds_to_first_step']:10.1f} s"
        )
        if "pass_ms" in entry:
            lines.append(f"  a pass takes {entry['pass_ms']:.1f} ms, every {entry['every']} steps")
        if "attention" in entry:
            lines.append(f"  attention: {entry['attention']}")
    if one["parked"]:
        lines.append("who waits is kept in the host's memory: they don't fit side by side")
    split = one["split_ms"]
    total = sum(split.values())
    parts = (f"{name} {ms:.2f} ({ms / total:.1%})" for name, ms in split.items())
    lines.append(f"{one['implementation']}, ms of a step of {total:.2f}: {', '.join(parts)}")
    return "\n".join(lines)


def read_entries(path: Path) -> list[Entry]:
    """What a file of an earlier bench has; nothing if there is none.

    Raises ``UserError`` for a file that is something else, which must not be overwritten, and for
    what can't be written.
    """
    require(path.parent.is_dir(), "--json", "must be in a folder that exists", str(path))
    require(not path.is_dir(), "--json", "must be a file, not a folder", str(path))
    writable = os.access(path if path.exists() else path.parent, os.W_OK)
    require(writable, "--json", "must be a file that can be written", str(path))
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
    except ValueError:
        entries = None
    if not (isinstance(entries, list) and all(map(_is_ours, entries))):
        raise UserError(f"--json must name a file of this bench or none yet, got {path}")
    return entries


def _is_ours(entry: object) -> bool:
    """Whether something in a file is an object of this bench, not of another's."""
    if not isinstance(entry, dict):
        return False
    if "environment" in entry:
        return isinstance(entry.get("presets"), list)
    return "preset" in entry


def merged(kept: list[Entry], environment: dict[str, Any], entries: list[Entry]) -> list[Entry]:
    """``kept`` with the entries of a preset in place of its old ones.

    An environment stands before the entries of its presets, whose names are its ``presets``.
    """
    new = {e["preset"] for e in entries}
    result: list[Entry] = []
    for entry in kept:
        if "environment" in entry:
            presets = [p for p in entry["presets"] if p not in new]
            if presets:
                result.append(entry | {"presets": presets})
        elif entry["preset"] not in new:
            result.append(entry)
    if result and (last := _last_environment(result))["environment"] == environment:
        last["presets"] += sorted(new)
        return [*result, *entries]
    return [*result, {"environment": environment, "presets": sorted(new)}, *entries]


def _last_environment(entries: list[Entry]) -> Entry:
    return [entry for entry in entries if "environment" in entry][-1]


def written(entries: list[Entry]) -> str:
    """A line an entry."""
    return "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n"
