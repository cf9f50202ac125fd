"""Every probe of every kept checkpoint of a run, into its folder, each once.

    probes/<probe>/step_00000128.parquet    run, step, tokens, probe, name, input, layer, head,
                                            position, value, probe_set

A file appears complete or not at all, and one of the same probe set is never made again: an
interrupted command goes on where it was, and a run that is still training is probed as far as it
is.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.files import write_atomically
from train.probes import PROBES
from train.probes.base import Finding
from train.probes.inputs import probe_inputs, probe_set_sha256
from train.runs import PROBE_COLUMNS, Run

_SET = b"probe_set"


def probe_run(
    run: Run,
    names: Iterable[str],
    *,
    rows: int,
    device: torch.device,
    steps: list[int] | None = None,
    cache_dir: Path | str | None = None,
    begin: Callable[[int], None] = lambda num_tables: None,
    advance: Callable[[str], None] = lambda what: None,
) -> int:
    """Make the tables that are missing; returns how many.

    names: of ``PROBES``. rows: prompts of each input. steps: kept steps to probe, all by default.
    cache_dir: of the run's text, its own by default. begin is told how many tables are missing,
    advance of each that was made.

    Raises ``UserError`` if the run's text can't be had or its rows are too short.
    """
    inputs = probe_inputs(run.data(cache_dir), rows=rows, device=device)
    probe_set = probe_set_sha256(inputs)
    kept = run.steps if steps is None else steps
    missing = {
        step: [name for name in names if _stored_set(_path(run, name, step)) != probe_set]
        for step in kept
    }
    begin(sum(map(len, missing.values())))
    made = 0
    for step, wanted in missing.items():
        if not wanted:
            continue
        decoder = run.at(step).model.to(device)
        for name in wanted:
            table = _table(run, step, name, PROBES[name](decoder, inputs), probe_set)
            path = _path(run, name, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _parquet(table, probe_set))
            made += 1
            advance(f"step {step}: {name}")
        # Hundreds of checkpoints don't fit into memory together.
        run.forget(step)
    return made


def _path(run: Run, name: str, step: int) -> Path:
    return run.folder.probes / name / f"step_{step:08d}.parquet"


def _stored_set(path: Path) -> str | None:
    """The probe set of a table; None where there is none that can be read."""
    try:
        return (pq.read_schema(path).metadata or {}).get(_SET, b"").decode()
    except (OSError, pa.ArrowException):
        return None


def _table(
    run: Run, step: int, name: str, found: Iterable[Finding], probe_set: str
) -> pd.DataFrame:
    table = pd.DataFrame(list(found), columns=Finding._fields)
    told = {"run": run.name, "step": step, "tokens": step * run.tokens_per_step, "probe": name}
    table = table.assign(**told, probe_set=probe_set)[list(PROBE_COLUMNS)]
    return table.astype({"layer": "int16", "head": "int16", "position": "int32"})


def _parquet(table: pd.DataFrame, probe_set: str) -> bytes:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _SET: probe_set})
    buffer = io.BytesIO()
    pq.write_table(arrow, buffer)
    return buffer.getvalue()
