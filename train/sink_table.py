"""Sink sums as what is written down: scalar metrics for curves, a table with every head.

Three ways to aggregate a sink rate are in use and differ; each has its name here:

    rate_030            threshold each sample, then average (the default; arXiv 2410.10781's code)
    rate_030_of_means   average alpha over samples, then threshold
    mass                no threshold: mean alpha
"""

import numpy as np
import pandas as pd
import torch

from train.metrics import THRESHOLDS, SinkTotals

PREFIXES = {
    "first": "sink",
    "first_row": "sink_row",
    "document": "sink_document",
    "null": "sink_null",
    "first_of_keys": "sink_of_keys",
}
"""Metric prefix by kind of key; single positions are in the table only."""

VALUE_PREFIXES = {"first": "", "position": "", "null": "null_", "first_of_keys": "of_keys_"}
"""What the names of ``sink_values`` begin with, by kind of key; other kinds are not among them."""

FIRST_KEYS = ("first", "first_row", "first_of_keys")
"""Kinds of key that are position 0 of a row."""

LOGGED_THRESHOLDS = (0.3, 0.8)
"""Thresholds whose rates are metrics: arXiv 2410.10781's and 2504.02732's; the table has all."""

LATER_LAYERS = 2
"""Layers 0 and 1 rarely sink, so a rate is given without them too (arXiv 2603.06591)."""


def threshold_name(eps: float) -> str:
    """0.3 -> "030"."""
    return f"{round(100 * eps):03d}"


def sink_metrics(
    totals: SinkTotals,
    prefixes: dict[str, str] = PREFIXES,
    thresholds: tuple[float, ...] = LOGGED_THRESHOLDS,
) -> dict[str, float]:
    """``<prefix>/{mass,baseline,excess,rate_030,...}`` and ``<prefix>/<...>/layer_03``.

    Means over samples, then over the heads and layers that have any (a window shorter than 64
    hides the first key, so its layer has none); kinds without samples are left out.
    """
    metrics: dict[str, float] = {}
    for kind, prefix in prefixes.items():
        sums = totals.sums.get(kind)
        if sums is None or not bool((sums.count > 0).any()):
            continue
        count_LH, alpha_LH, baseline_LH, over_LHE = (
            value.double().cpu().numpy()
            for value in (sums.count, sums.alpha, sums.baseline, sums.over)
        )
        # A head without a sample is left out of every mean.
        measured_LH = count_LH > 0
        count_LH = np.maximum(count_LH, 1)
        mass_LH, baseline_LH = alpha_LH / count_LH, baseline_LH / count_LH
        values_LH = {"mass": mass_LH, "baseline": baseline_LH, "excess": mass_LH - baseline_LH}
        for eps in thresholds:
            name = f"rate_{threshold_name(eps)}"
            values_LH[name] = over_LHE[..., THRESHOLDS.index(eps)] / count_LH
            values_LH[f"{name}_of_means"] = mass_LH > eps
        for name, value_LH in values_LH.items():
            metrics[f"{prefix}/{name}"] = float(value_LH[measured_LH].mean())
        later_LH = measured_LH & (np.arange(len(measured_LH)) >= LATER_LAYERS)[:, None]
        for eps in thresholds:
            if later_LH.any():
                name = f"rate_{threshold_name(eps)}"
                key = f"{prefix}/{name}_from_layer_{LATER_LAYERS}"
                metrics[key] = float(values_LH[name][later_LH].mean())
        for name in ("mass", "excess", "rate_030"):
            for layer, measured_H in enumerate(measured_LH):
                if measured_H.any():
                    mean = float(values_LH[name][layer, measured_H].mean())
                    metrics[f"{prefix}/{name}/layer_{layer:02d}"] = mean
    return metrics


def sink_table(totals: SinkTotals, alpha_kind: str) -> pd.DataFrame:
    """One line a (layer, head, key): key kind, position (-1 but for positions), count of samples,
    mean alpha and baseline, the number of samples above each threshold, and ``alpha_kind``: whether
    alpha is a probability or a proxy."""
    return sink_tables([totals], alpha_kind).drop(columns="record")


def sink_tables(records: list[SinkTotals], alpha_kind: str) -> pd.DataFrame:
    """The lines of ``sink_table`` for each of a run's records, whose index is in ``record``."""
    tables = []
    for kind in records[0].sums:
        count, alpha, baseline, over = (
            value if kind == "position" else value.unsqueeze(3)
            for value in (
                torch.stack([getattr(totals.sums[kind], name) for totals in records])
                for name in ("count", "alpha", "baseline", "over")
            )
        )
        record, layer, head, place = torch.meshgrid(
            *(torch.arange(size) for size in count.shape), indexing="ij"
        )
        columns = {
            "record": record.flatten().numpy(),
            "layer": layer.flatten().to(torch.int16).numpy(),
            "head": head.flatten().to(torch.int16).numpy(),
            "key": kind,
            "position": (place if kind == "position" else place - 1)
            .flatten()
            .to(torch.int32)
            .numpy(),
            "count": count.flatten().to(torch.int64).numpy(),
            "alpha": (alpha / count).flatten().numpy(),
            "baseline": (baseline / count).flatten().numpy(),
        }
        for index, eps in enumerate(THRESHOLDS):
            name = f"over_{threshold_name(eps)}"
            columns[name] = over[..., index].flatten().to(torch.int64).numpy()
        columns["alpha_kind"] = alpha_kind
        table = pd.DataFrame(columns)
        tables.append(table[table["count"] > 0])
    return pd.concat(tables).sort_values("record", kind="stable", ignore_index=True)


def sink_values(totals: SinkTotals, prefixes: dict[str, str] = VALUE_PREFIXES) -> pd.DataFrame:
    """The sums on the CPU as figures by name: columns name, layer, head, position, value.

    prefixes: what names begin with, by kind of key; kinds that aren't in it are left out.

    By layer and head, for key 0 (``first``) and, from kind ``position``, the keys after it:

        mass, baseline, excess    means over samples of alpha, of a uniform head's, their difference
        rate_020 ... rate_080     share of samples with alpha > eps

    Of the whole model, layer and head -1, ``sink_metrics`` of key 0 at all thresholds. Of a null
    slot the names begin with ``null_`` and the position is -1; those of key 0 with the slot left
    out begin with ``of_keys_``. What has no sample has no line.
    """
    heads = sink_table(totals, "probability")
    is_again = (heads["key"] == "position") & (heads["position"] == 0)
    heads = heads[heads["key"].isin(list(prefixes)) & ~is_again]
    prefix = heads["key"].map(prefixes)
    position = heads["position"].where(~heads["key"].isin(FIRST_KEYS), 0)
    values = {
        "mass": heads["alpha"],
        "baseline": heads["baseline"],
        "excess": heads["alpha"] - heads["baseline"],
    }
    for eps in THRESHOLDS:
        over = heads[f"over_{threshold_name(eps)}"]
        values[f"rate_{threshold_name(eps)}"] = over / heads["count"]
    tables = [
        pd.DataFrame(
            {
                "name": prefix + name,
                "layer": heads["layer"].astype(int),
                "head": heads["head"].astype(int),
                "position": position.astype(int),
                "value": value.astype(float),
            }
        )
        for name, value in values.items()
    ]
    kinds = {kind: kind for kind in prefixes if kind != "position"}
    for key, value in sink_metrics(totals, kinds, THRESHOLDS).items():
        kind, name = key.split("/", 1)
        if "/" not in name:
            place = 0 if kind in FIRST_KEYS else -1
            row = (prefixes[kind] + name, -1, -1, place, value)
            tables.append(pd.DataFrame([row], columns=tables[0].columns))
    return pd.concat(tables, ignore_index=True)
