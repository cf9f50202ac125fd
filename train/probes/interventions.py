"""Does the sink move or die? Interventions on position 0 and on others (arXiv 2603.06591, whose
reviewers asked for them; the first is after 2605.06611).

On the first 16 natural prompts (with a BOS where the model was trained with one), T their length,
64. Everywhere alpha_k = mean over queries i >= k of P[i, k], itself included, whatever the mask
shows them, and mean over prompts and heads; over layers too unless ``layer`` says which. p = 8.

    baseline_alpha                 unmodified, at ``position`` 0, 1 and p; also by measured layer
    baseline_norm_ratio            largest over layers of the norm after the block over the median
                                   norm of the other positions, mean over prompts; at 0 and p
    baseline_slot_mass             attention to the slot, mean over all queries

Position p sees itself alone, in blocks 0 to ``layer`` or in block ``layer`` only:

    self_only_alpha, self_only_one_block_alpha              of ``position`` p, and of 0
    self_only_norm_ratio, self_only_one_block_norm_ratio    of p

p's own query is all p's there: it adds up to 1 / (T - p) = 0.018 to p's alpha by itself. A sink
that comes from seeing nothing else gives p the alpha of 0.

Key 0 is hidden from every later query in every layer, its token still there:

    hidden_first_alpha             of ``position`` 0 to 3, over layers; 0's own query is left, 1 / T
    hidden_first_next_alpha        of position 1, which then is the first that sees itself alone;
                                   also by measured layer
    hidden_first_slot_mass         as above

The feed-forward of block ``layer`` adds nothing at ``position`` 0, or at the control p:

    zeroed_ffn_first_alpha         of key 0
    zeroed_ffn_norm_ratio          of position 0

For kinds that are no softmax P is the papers' proxy, whose rows may be empty. Slots stay visible
under every mask, so with one p never gives itself all; kinds without one have no slot masses. In a
layer with a window, queries that are too far to see a key count as 0.

Cost: 4 L + 1 forward passes over 16 prompts (1024 tokens), with attention matrices. 1.2 s of one
core for the CPU preset.

Axes: B rows, T query and S key positions, L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.decoder import Decoder
from models.overrides import LayerOverride
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import (
    Trace,
    cut,
    everywhere,
    hide_first,
    norm_ratio_B,
    see_itself_alone,
    trace,
    zero_at,
)

ROWS = 16
"""Prompts."""

POSITION = 8
"""p: an ordinary position, far enough to have seen others and to be seen by most."""

SHOWN = 4
"""Leading keys whose alpha is given when key 0 is hidden."""


def probe_interventions(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """Baselines and the three interventions (see the module's docstring)."""
    name = inputs.natural()
    batch = cut(inputs.prompts[name], ROWS)
    layers = range(len(decoder.blocks))

    baseline = trace(decoder, batch)
    for position in (0, 1, POSITION):
        yield from _alpha_findings("baseline_alpha", name, baseline, position)
    for position in (0, POSITION):
        ratio = norm_ratio(baseline, position)
        yield Finding("baseline_norm_ratio", name, ratio, position=position)
    yield from _slot_finding("baseline_slot_mass", name, baseline)

    alone = LayerOverride(mask=see_itself_alone(POSITION))
    for layer in layers:
        one_block = trace(decoder, batch, {layer: alone})
        blocks = {block: alone for block in layers[: layer + 1]}
        runs = {"self_only": one_block if layer == 0 else trace(decoder, batch, blocks)}
        runs["self_only_one_block"] = one_block
        for kind, run in runs.items():
            for position in (POSITION, 0):
                value = mean_alpha(run, position)
                yield Finding(f"{kind}_alpha", name, value, layer=layer, position=position)
            ratio = norm_ratio(run, POSITION)
            yield Finding(f"{kind}_norm_ratio", name, ratio, layer=layer, position=POSITION)

    hidden = trace(decoder, batch, everywhere(decoder, mask=hide_first))
    for position in range(SHOWN):
        value = mean_alpha(hidden, position)
        yield Finding("hidden_first_alpha", name, value, position=position)
    yield from _alpha_findings("hidden_first_next_alpha", name, hidden, 1)
    yield from _slot_finding("hidden_first_slot_mass", name, hidden)

    for position in (0, POSITION):
        zeroed = LayerOverride(feed_forward_output=zero_at(position))
        for layer in layers:
            run = trace(decoder, batch, {layer: zeroed})
            values = {"first_alpha": mean_alpha(run, 0), "norm_ratio": norm_ratio(run, 0)}
            for kind, value in values.items():
                yield Finding(f"zeroed_ffn_{kind}", name, value, layer=layer, position=position)


def alpha_L(run: Trace, position: int) -> Tensor:
    """alpha of a key by layer, mean over prompts and heads."""
    alphas = [p_BHTS[:, :, position:, position].mean() for p_BHTS in run.probabilities_BHTS]
    return torch.stack(alphas)


def mean_alpha(run: Trace, position: int) -> float:
    """alpha of a key, mean over layers, prompts and heads."""
    return alpha_L(run, position).mean().item()


def norm_ratio(run: Trace, position: int) -> float:
    """Largest over layers of the position's norm after the block over the others' median."""
    ratios = [norm_ratio_B(hidden_BTC, position).mean() for hidden_BTC in run.hidden_BTC[1:]]
    return torch.stack(ratios).max().item()


def _alpha_findings(kind: str, name: str, run: Trace, position: int) -> Iterator[Finding]:
    """alpha of a key over all layers, then by layer."""
    by_layer = alpha_L(run, position)
    yield Finding(kind, name, by_layer.mean().item(), position=position)
    for layer, value in enumerate(by_layer.tolist()):
        yield Finding(kind, name, value, layer=layer, position=position)


def _slot_finding(kind: str, name: str, run: Trace) -> Iterator[Finding]:
    """Mean attention to the slot, of kinds that have one."""
    masses = [mass_BHT.mean() for mass_BHT in run.slot_BHT if mass_BHT is not None]
    if masses:
        yield Finding(kind, name, torch.stack(masses).mean().item())
