"""Stored results made by hand: records with effects of one's choice."""

from pathlib import Path

import numpy as np
import pandas as pd

from train.findings import FINDINGS
from train.findings.base import Finding
from train.findings.budgets import BUDGETS, planned
from train.findings.measures import Record
from train.findings.store import record_path, store_record

STEPS = [250 * i for i in range(11)]
JITTER = 0.002
"""Standard deviation of every measure over seeds, about."""

MEASURES = {
    "heads": 48,
    "tokens": 1500 * 32768,
    "passes": 0.8,
    "mean_keys": 512.5,
    **{
        f"{place}/{name}": value
        for place in ("text", "bos_text", "eos_text", "natural", "written")
        for name, value in {
            "excess": 0.1,
            "mass": 0.174,
            "rate_030": 0.1,
            "rate_080": 0.05,
            "heads_030": 5,
            "null_rate_030": 0.0,
            "hidden_ratio": 8.0,
            "value_ratio": 0.3,
            "loss": 3.0,
            **{f"rate_030_{where}_{p}": 0.1 for where in ("at", "beside") for p in range(3)},
        }.items()
    },
    **{f"row_{place}/loss": 2.5 for place in ("text", "bos_text", "eos_text")},
    **{f"text/cost_{what}": 0.0 for what in ("token", "noise", "shared")},
    **{"text/cost_bos": 0.2, "text/bos_cosine": 0.9},
    "documents/start_rate_030": 0.3,
    "documents/inner_rate_030": 0.05,
    "canonical_loss": 3.0,
    "train_loss": 2.9,
    "own_loss": 3.1,
    "gap": 0.2,
    "onset/onset_step": 500,
    "onset/spacing_step": 25,
    "onset/onset_lr_sum": 0.6,
    "onset/sink_heads": 5,
    "onset/censored": 0,
    "onset/censored_draws": 0.0,
    "onset/heads_of_layers_0_1": 0,
}
"""What a run has if nothing else is said."""

COUNTED = ("heads", "tokens", "heads_030", "_step", "censored", "layers_0_1")


def made_record(pool, own, seed: int, values: dict, curves: dict[str, list[float]]) -> Record:
    """A record whose measures are ``MEASURES`` changed by ``values``, seeds beside each other."""
    generator = np.random.default_rng([seed, len("".join(own))])
    jitter = {name: generator.normal(scale=JITTER) for name in MEASURES}
    measured = {
        name: value if name.endswith(COUNTED) else value + jitter[name]
        for name, value in (MEASURES | values).items()
    }
    columns = {"step": STEPS, "tokens": [32 * step for step in STEPS]}
    flat = dict.fromkeys(("excess", "excess/layer_00", "excess/layer_01"), [0.1] * len(STEPS))
    return Record(
        pool=pool,
        own=tuple(own),
        seed=seed,
        settings={"model.num_layers": 8},
        made_by={"device": "H100", "alpha_kind": "probability", "commit": "c" * 40},
        seconds=50.0,
        values=measured,
        curves=pd.DataFrame(columns | flat | curves),
        heads=[(0, 0, None), (3, 0, 500), (3, 1, 750)],
    )


def store_made(
    folder: Path,
    finding: Finding,
    values: dict[str, dict[str, float]] | None = None,
    curves: dict[str, dict[str, list[float]]] | None = None,
    *,
    seeds: int = 3,
    budget: str = "minutes",
) -> None:
    """Store made records of all arms of a finding; values, curves: by arm."""
    for arm in finding.arms_of(budget):
        if arm.context_of is not None:
            continue
        for seed in range(seeds):
            plan = planned(finding, BUDGETS[budget], arm, seed)
            own_values, own_curves = ((given or {}).get(arm.name, {}) for given in (values, curves))
            record = made_record(plan.pool, plan.own, seed, own_values, own_curves)
            store_record(record_path(folder, plan), record)


def fewer_keys(folder: Path, seeds: int = 3) -> None:
    """The arm of packing whose context depends on the data."""
    for seed in range(seeds):
        own = ("packing.context=320", "packing.batch_tokens=32640")
        record = made_record("minutes", own, seed, {}, {})
        name = f"context=320_batch_tokens=32640_seed={seed}.json"
        store_record(folder / "runs" / "minutes" / name, record)


PACKING = FINDINGS["packing"]

COLLAPSED = {
    "causal_pinned_bos": {
        "bos_text/excess": 0.2,
        "bos_text/rate_030": 0.2,
        "text/excess": 0.01,
        "text/loss": 4.0,
        "row_text/loss": 2.6,
    },
    "document_pinned_bos": {"bos_text/excess": 0.2, "text/excess": 0.01, "text/loss": 4.0},
    "causal_untied": {"text/cost_bos": 0.0},
    "causal_longer": {"bos_text/loss": 3.2},
    "document": {"text/excess": 0.05},
    "document_long": {"text/excess": 0.05},
}
"""What the paper says of ``packing``."""
