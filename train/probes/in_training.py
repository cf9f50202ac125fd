"""Probes at validations, as metrics of the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from models.decoder import Decoder
from train.probes import PROBES
from train.probes.base import ProbeInputs


def probe_metrics(names: Iterable[str], decoder: Decoder, inputs: ProbeInputs) -> dict[str, float]:
    """``probe/<probe>/<input>/<name>``, and ``.../layer_03`` the mean over a layer's heads.

    What is of a position after the first has it in its name, ``.../position_08``; of perturbations
    and of single keys' sinks, which have one for every position, only the tables of
    ``scripts.probe`` have those.
    """
    metrics: dict[str, float] = {}
    training = decoder.training
    decoder.eval()
    for probe in names:
        by_layer: dict[str, list[float]] = defaultdict(list)
        for found in PROBES[probe](decoder, inputs):
            key = f"probe/{probe}/{found.input}/{found.name}"
            if found.position > 0:
                if probe == "sinks" or found.name.startswith("perturbation"):
                    continue
                key += f"/position_{found.position:02d}"
            if found.layer >= 0:
                by_layer[f"{key}/layer_{found.layer:02d}"].append(found.value)
            elif found.head < 0:
                metrics[key] = found.value
        metrics |= {key: sum(values) / len(values) for key, values in by_layer.items()}
    decoder.train(training)
    return metrics
