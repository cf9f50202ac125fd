"""What a finding keeps of a run: some 20 kB that are enough for every table, verdict and figure.

Measures of the last step, by name:

    <input>/excess, mass, rate_030, ...   the first key's on 64-token prompts (``probes.sinks``);
                                          input: text, bos_text, eos_text, written, random, context
    <input>/null_..., of_keys_...         the slot's, and the first key's without the slot
    <input>/heads_030                     heads whose mean alpha is above 0.3, of ``heads``
    <input>/rate_030_at_P, beside_P       the rate of the key at position P (from 0), the largest of
                                          the other of the first 16 keys
    natural/...                           of the prompts that begin as the run's own rows do
    <input>/loss, cost_without_bos, ...   nats a label (``probes.losses``), of row_text, ... too
    text/cost_bos, cost_noise, ...        nats that a token in front costs (``probes.in_front``)
    <input>/hidden_ratio, value_ratio     first position over the others: of the layer with the
                                          largest hidden, the smallest value ratio (mean of heads)
    documents/start_..., inner_...        keys of documents (``probes.documents``)
    canonical_loss, own_loss              at the last validation
    train_loss, gap                       mean over the last tenth of the records; own_loss - that
    passes, tokens, mean_keys, tokens_per_second
    onset/...                             ``train.onset``, in steps, tokens and summed lr;
                                          heads_of_layers_0_1: those past their onset

Curves are columns over some of the recorded steps. Those of runs that write into rows have
rows/mass_at_P and mass_beside_P too: as above, of alpha over whole training rows, means of heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.packing import BosKind
from kernels.errors import UserError
from train.findings.budgets import Planned, told_settings
from train.onset import HeadOnset, RunOnset, head_onsets, run_onset, scheduled_rates
from train.report.curves import log_spaced
from train.runs import Run
from train.sink_table import LATER_LAYERS

PROBED = ("sinks", "losses", "in_front", "norms", "documents")
"""Probes of the last step that measures come from."""

POSITIONS = 3
"""Leading keys whose own rates are kept."""

RECORDS = 40
"""Recorded steps of a curve that are kept, log-spaced, validations besides."""

CURVES = {
    "excess": "sink/excess",
    "mass": "sink/mass",
    "rate_030": "sink/rate_030",
    "text/excess": "probe/t64_text/excess",
    "text/rate_030": "probe/t64_text/rate_030",
    "bos_text/excess": "probe/t64_bos_text/excess",
    "bos_text/rate_030": "probe/t64_bos_text/rate_030",
    "text/null_rate_030": "probe/t64_text_null/rate_030",
    "bos_text/null_rate_030": "probe/t64_bos_text_null/rate_030",
    "canonical_loss": "val/canonical_loss",
    "train_loss": "train/loss",
}
"""Column of a run's curves by name, and the metric it is; layers' are ``excess/layer_03`` and
``rate_030/layer_03``."""


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    own: the arm's overrides. seconds: of the device, all starts together; of runs that shared it,
    a share of the time on the clock. settings: ``told_settings``. made_by: commit, device, hashes.
    curves: columns step, tokens and of ``CURVES``. heads: (layer, head, onset's step or None).
    """

    pool: str
    own: tuple[str, ...]
    seed: int
    settings: dict[str, Any]
    made_by: dict[str, Any]
    seconds: float
    values: dict[str, float]
    curves: pd.DataFrame
    heads: list[tuple[int, int, int | None]]

    def to_json(self) -> bytes:
        """The file's content: one line a section."""
        told = {name: value for name, value in vars(self).items() if name != "curves"}
        told["values"] = {name: rounded(value, 6) for name, value in self.values.items()}
        told["curves"] = {
            name: [rounded(value, 4) for value in self.curves[name].tolist()]
            for name in self.curves
        }
        lines = [
            f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
            for name, value in told.items()
        ]
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_json(cls, path: Path) -> Record:
        """Raises ``UserError`` for a file that is no record."""
        try:
            told = json.loads(path.read_bytes())
            curves = pd.DataFrame(told["curves"]).astype(float)
            curves = curves.astype({"step": int, "tokens": int})
            heads = [(int(a), int(b), c) for a, b, c in told["heads"]]
            values = {
                name: math.nan if value is None else float(value)
                for name, value in told["values"].items()
            }
            told |= {"own": tuple(told["own"]), "curves": curves, "heads": heads, "values": values}
            return cls(**told)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} must be a stored run, got {type(error).__name__}") from error


def rounded(value: float, digits: int) -> float | int | None:
    """``value`` to that many significant digits; None for what is no number."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    whole = float(value).is_integer() and abs(value) < 1e15
    return int(value) if whole else short


def measured(run: Run, plan: Planned, seconds: float) -> Record:
    """The record of a finished run whose last step was probed.

    seconds: what it took. Raises ``UserError`` for a folder that lacks something.
    """
    metrics = run.metrics().drop_duplicates("step", keep="last")
    probes = run.probes()
    probes = probes[(probes["step"] == run.steps[-1]) & probes["probe"].isin(PROBED)]
    sinks = run.sinks()
    told = run.provenance
    values = dict(_of_probes(probes)) | _of_metrics(metrics)
    values["mean_keys"] = told["data"]["packing"]["mean_keys"]
    natural = "text" if run.settings["packing"]["bos"] == BosKind.none.value else "bos_text"
    values |= {
        f"natural/{name.partition('/')[2]}": value
        for name, value in values.items()
        if name.startswith(f"{natural}/")
    }
    heads: list[HeadOnset] = []
    if (sinks["key"] == "first").any():
        rates = scheduled_rates(run.config, int(sinks["step"].max()))
        heads = head_onsets(sinks, rates)
        values |= _of_onset(run_onset(sinks, rates))
        early = [one for one in heads if one.layer < LATER_LAYERS and one.onset is not None]
        values["onset/heads_of_layers_0_1"] = len(early)
    git = told.get("git") or {}
    return Record(
        pool=plan.pool,
        own=plan.own,
        seed=plan.seed,
        settings=told_settings(run.settings),
        made_by={
            "commit": git.get("commit"),
            "dirty": git.get("dirty"),
            "device": told.get("device"),
            "torch": (told.get("versions") or {}).get("torch"),
            "data_sha256": told["data"]["sha256"][:16],
            "probe_sets": sorted(map(str, probes["probe_set"].unique())),
            "alpha_kind": told.get("alpha_kind"),
            "trained_with_bos": natural == "bos_text",
        },
        seconds=round(seconds, 1),
        values=values,
        curves=_curves(metrics, _positions(sinks) if _is_written(run) else pd.DataFrame()),
        heads=[(one.layer, one.head, one.onset and one.onset.step) for one in heads],
    )


def _of_probes(probes: pd.DataFrame) -> Iterator[tuple[str, float]]:
    probes = probes.drop_duplicates(
        ["probe", "name", "input", "layer", "head", "position"], keep="last"
    )
    whole = probes[(probes["layer"] == -1) & (probes["head"] == -1) & (probes["position"] <= 0)]
    for row in whole.itertuples():
        place = "documents" if row.probe == "documents" else row.input
        yield f"{place}/{row.name}", row.value
    sinks = probes[(probes["probe"] == "sinks") & (probes["head"] >= 0)]
    for place, table in sinks[sinks["input"] != "context"].groupby("input"):
        mass = table[(table["name"] == "mass") & (table["position"] == 0)]["value"]
        yield "heads", len(mass)
        yield f"{place}/heads_030", int((mass > 0.3).sum())
        rates = table[(table["name"] == "rate_030") & (table["position"] >= 0)]
        rate_P = rates.groupby("position")["value"].mean()
        for position in rate_P.index[:POSITIONS]:
            yield f"{place}/rate_030_at_{position}", rate_P[position]
            yield f"{place}/rate_030_beside_{position}", rate_P.drop(position).max()
    norms = probes[probes["probe"] == "norms"]
    norms = norms[norms["name"].isin(["hidden_ratio", "value_ratio"]) & (norms["layer"] >= 0)]
    by_layer = norms.groupby(["input", "name", "layer"])["value"].mean()
    for (place, name), layers in by_layer.groupby(["input", "name"]):
        yield f"{place}/{name}", layers.max() if name == "hidden_ratio" else layers.min()


def _of_metrics(metrics: pd.DataFrame) -> dict[str, float]:
    def last(name: str) -> float:
        known = metrics[name].dropna() if name in metrics else pd.Series(dtype=float)
        return float(known.iloc[-1]) if len(known) else math.nan

    losses = metrics["train/loss"].dropna()
    train_loss = float(losses.iloc[-max(1, math.ceil(len(losses) / 10)) :].mean())
    speed = metrics.get("perf/tokens_per_second", pd.Series(dtype=float)).dropna()
    return {
        "canonical_loss": last("val/canonical_loss"),
        "own_loss": last("val/own_loss"),
        "train_loss": train_loss,
        "gap": last("val/own_loss") - train_loss,
        "passes": last("data/passes"),
        "unique_tokens": last("data/unique_tokens"),
        "steps": int(metrics["step"].max()),
        "tokens": int(metrics["tokens"].max()),
        "tokens_per_second": float(speed.median()) if len(speed) else math.nan,
    }


def _of_onset(onset: RunOnset) -> dict[str, float]:
    """Moments of a censored run are nan, ``censored`` 1; an open end of the interval is nan."""
    values = {
        "censored": float(onset.onset is None),
        "censored_draws": onset.censored_draws,
        "sink_heads": onset.sink_heads,
        "final_excess": onset.final_excess,
    }
    for name in ("onset", "spacing", "low", "high"):
        moment = getattr(onset, name)
        for unit in ("step", "tokens", "lr_sum"):
            values[f"{name}_{unit}"] = math.nan if moment is None else getattr(moment, unit)
    return {f"onset/{name}": value for name, value in values.items()}


def _is_written(run: Run) -> bool:
    packing = run.settings["packing"]
    return packing["fixed_position"] is not None or bool(packing["random_positions"])


def _positions(sinks: pd.DataFrame) -> pd.DataFrame:
    """By step, the mean alpha of the key at each of the first positions, and of the largest of the
    other leading keys."""
    leading = sinks[sinks["key"] == "position"]
    mass_SP = leading.pivot_table(index="step", columns="position", values="alpha")
    curves = {}
    for position in mass_SP.columns[:POSITIONS]:
        curves[f"rows/mass_at_{position}"] = mass_SP[position]
        curves[f"rows/mass_beside_{position}"] = mass_SP.drop(columns=position).max(axis=1)
    return pd.DataFrame(curves)


def _curves(metrics: pd.DataFrame, positions: pd.DataFrame) -> pd.DataFrame:
    layers = [
        name for name in metrics if name.startswith(("sink/excess/layer_", "sink/rate_030/layer_"))
    ]
    names = {ours: name for ours, name in CURVES.items() if name in metrics}
    names |= {name.removeprefix("sink/"): name for name in layers}
    validated = metrics["step"][metrics["val/canonical_loss"].notna()]
    recorded = metrics["step"][metrics["step"] > 0].tolist()
    chosen = metrics[metrics["step"].isin({*validated, *log_spaced(recorded, RECORDS)})]
    columns = {ours: chosen[name] for ours, name in names.items()}
    at = chosen["step"].to_numpy()
    columns |= {name: positions[name].reindex(at).to_numpy() for name in positions}
    names |= dict.fromkeys(positions)
    curves = pd.DataFrame({"step": chosen["step"], "tokens": chosen["tokens"], **columns})
    return curves.astype(dict.fromkeys(names, np.float64)).reset_index(drop=True)
