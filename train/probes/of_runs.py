"""Every probe of every kept checkpoint of a run, into its folder, each once.

    probes/<probe>/step_00000128.parquet    run, step, tokens, probe, name, input, layer, head,
                                            position, value, probe_set, alpha_kind

A file appears complete or not at all, and is made again only if the weights, the probe set or the
probe's own code are others: an interrupted command goes on where it was, and a run that is still
training is probed as far as it is.
"""

from __future__ import annotations

import hashlib
import io
import sys
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
from train.probes.trace import trace
from train.runs import PROBE_COLUMNS, Run

_MADE_OF = b"made_of"
"""Metadata of a table: what it was made of, see ``_made_of``."""


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
    missing: dict[int, dict[str, str]] = {}
    for step in kept:
        # Told before the weights are read: were they replaced in between, the table would be told
        # apart from one of the new weights.
        made_of = {name: _made_of(run, step, name, probe_set) for name in names}
        missing[step] = {
            name: told for name, told in made_of.items() if _stored(_path(run, name, step)) != told
        }
    begin(sum(map(len, missing.values())))
    made = 0
    for step, wanted in missing.items():
        if not wanted:
            continue
        decoder = run.at(step).model.to(device)
        of_all = {"probe_set": probe_set, "alpha_kind": decoder.alpha_kind}
        for name, told in wanted.items():
            table = _table(run, step, name, PROBES[name](decoder, inputs), of_all)
            path = _path(run, name, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _parquet(table, told))
            made += 1
            advance(f"step {step}: {name}")
        # Hundreds of checkpoints don't fit into memory together.
        run.forget(step)
    return made


def _path(run: Run, name: str, step: int) -> Path:
    return run.folder.probes / name / f"step_{step:08d}.parquet"


def _made_of(run: Run, step: int, name: str, probe_set: str) -> str:
    """Digests of the weights and of the probe's code (its file and ``trace``), and the set."""
    code = hashlib.sha256()
    for module in (PROBES[name].__module__, trace.__module__):
        code.update(Path(sys.modules[module].__file__ or "").read_bytes())
    return f"{probe_set} {run.at(step).weights_sha256} {code.hexdigest()}"


def _stored(path: Path) -> str | None:
    """What a table was made of; None where there is none that can be read."""
    try:
        return (pq.read_schema(path).metadata or {}).get(_MADE_OF, b"").decode()
    except (OSError, pa.ArrowException):
        return None


def _table(
    run: Run, step: int, name: str, found: Iterable[Finding], told: dict[str, str]
) -> pd.DataFrame:
    table = pd.DataFrame(list(found), columns=Finding._fields)
    of_step = {"run": run.name, "step": step, "tokens": step * run.tokens_per_step, "probe": name}
    table = table.assign(**of_step, **told)[list(PROBE_COLUMNS)]
    return table.astype({"layer": "int16", "head": "int16", "position": "int32"})


def _parquet(table: pd.DataFrame, made_of: str) -> bytes:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _MADE_OF: made_of})
    buffer = io.BytesIO()
    pq.write_table(arrow, buffer)
    return buffer.getvalue()
