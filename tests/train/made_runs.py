"""Run folders made by hand: curves of one's choice in the files that a run leaves."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from train.config import compose
from train.metrics import THRESHOLDS
from train.run_folder import RunFolder, write_run_files
from train.sink_table import threshold_name

BASELINE = 0.074
TOKENS_PER_STEP = 1024
SAMPLES = 20


def made_run(
    path: Path,
    *overrides: str,
    steps: list[int],
    onset: int | None,
    layers: int = 2,
    heads: int = 4,
    kind: str = "probability",
) -> Path:
    """A run whose heads rise from the baseline to 0.5 and, evenly, up to 0.9 at step ``onset``, or
    never (None), with losses, held-out probes and norm ratios."""
    _, settings = compose(["debug=cpu", f"model.num_layers={layers}", *overrides])
    provenance = {
        "hash": "0a1b2c3d",
        "git": {"commit": "c" * 40, "dirty": True},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "data": {"sha256": "d" * 64},
        "alpha_kind": kind,
    }
    folder = RunFolder(path)
    write_run_files(folder, settings, provenance)
    table = _sinks(steps, onset, layers, heads, kind)
    folder.sinks.mkdir()
    table.to_parquet(folder.sinks / f"part-{max(steps):08d}.parquet", index=False)
    _metrics(table, layers, settings["seed"]).to_csv(folder.metrics, index=False)
    return path


def _sinks(steps: list[int], onset: int | None, layers: int, heads: int, kind: str) -> pd.DataFrame:
    grid = pd.MultiIndex.from_product(
        [steps, range(layers), range(heads)], names=["step", "layer", "head"]
    ).to_frame(index=False)
    is_sink = grid["step"] >= (np.inf if onset is None else onset)
    index = heads * grid["layer"] + grid["head"]
    alpha = np.where(is_sink, 0.5 + 0.4 * index / (layers * heads - 1), BASELINE)
    table = grid.assign(
        tokens=TOKENS_PER_STEP * grid["step"],
        key="first",
        position=-1,
        count=SAMPLES,
        alpha=alpha,
        baseline=BASELINE,
        **{f"over_{threshold_name(eps)}": SAMPLES * (alpha > eps) for eps in THRESHOLDS},
        alpha_kind=kind,
    )
    return table


def _metrics(table: pd.DataFrame, layers: int, seed: int) -> pd.DataFrame:
    by_step = table.groupby("step")
    metrics = pd.DataFrame(
        {
            "tokens": by_step["tokens"].first(),
            "sink/mass": by_step["alpha"].mean(),
            "sink/baseline": by_step["baseline"].mean(),
            "sink/rate_030": by_step["over_030"].sum() / by_step["count"].sum(),
        }
    ).reset_index()
    metrics["sink/excess"] = metrics["sink/mass"] - metrics["sink/baseline"]
    # Held out at every second record, as if validated less often than measured.
    held_out = metrics.index % 2 == 1
    metrics.loc[held_out, "val/canonical_loss"] = 5 - 0.1 * np.log(metrics["step"]) + 0.25 * seed
    for name, loss in {"text": 4.5, "bos_text": 4.0}.items():
        metrics.loc[held_out, f"probe/t64_{name}/loss"] = loss
        metrics.loc[held_out, f"probe/t64_{name}/excess"] = metrics["sink/excess"]
    for prefix in ("norm_first", "norm"):
        for layer in range(layers):
            metrics[f"{prefix}/massive_ratio/layer_{layer:02d}"] = 1.0 + layer + metrics.index
            metrics[f"{prefix}/value_ratio/layer_{layer:02d}"] = 1 / (1.0 + layer + metrics.index)
    return metrics


def add_probes(path: Path, probe_set: str, values: dict[int, float]) -> None:
    """Probes of kept checkpoints: by step, the excess on text, and the cost of hiding position 0 on
    text, twice the excess, and on BOS and text, three times."""
    rows = []
    for step, value in values.items():
        told = {"run": path.name, "step": step, "tokens": TOKENS_PER_STEP * step}
        model = {"layer": -1, "head": -1, "position": -1}
        sinks = told | model | {"probe": "sinks", "name": "excess", "input": "text", "position": 0}
        # A head's value and another position's, which are not the model's.
        rows += [sinks | {"value": value}, sinks | {"layer": 1, "head": 2, "value": 9.0}]
        rows += [sinks | {"position": 1, "value": 9.0}]
        cost = told | model | {"probe": "losses", "name": "cost_hidden_first"}
        rows += [cost | {"input": "text", "value": 2 * value}]
        rows += [cost | {"input": "bos_text", "value": 3 * value}]
    folder = RunFolder(path)
    folder.probes.mkdir(exist_ok=True)
    table = pd.DataFrame(rows).assign(probe_set=probe_set)
    table.to_parquet(folder.probes / "made.parquet", index=False)


def json_block(page: str, name: str) -> dict:
    """What the page's script element ``name`` holds."""
    start = page.index(f'<script id="{name}" type="application/json">')
    start = page.index(">", start) + 1
    return json.loads(page[start : page.index("</script>", start)])
