"""Does the sink move or die? Interventions on position 0 and on another one (arXiv 2603.06591,
whose reviewers asked for them; the first is after 2605.06611).

On the first 16 natural prompts (with a BOS where the model was trained with one), T their length,
64. p is a position of choice, 8 by default. Each run's findings begin with its name:

    baseline               unmodified
    self_only              position p sees itself alone in blocks 0 to ``layer``
    self_only_one_block    the same in block ``layer`` only
    hidden_first           key 0 is hidden from every later query in every layer, its token still
                           there and seeing itself
    hidden_other           key p is: the control
    zeroed_ffn_first       the feed-forward of block ``layer`` adds nothing at position 0
    zeroed_ffn_other       it adds nothing at position p: the control

and go on with what was measured. ``layer`` is that of the intervention, -1 if it is in all; of
baseline, hidden_first and hidden_other alphas are also given by the layer they are measured in.

    _alpha            of the key at ``position`` 0, 1, 2, 3 and p
    _best_alpha       largest alpha of a key of the prompt's first half: where the sink is now
    _best_position    which key that is
    _norm_ratio       norm after the block over the median norm of the other positions, mean over
                      prompts, the largest over layers; of ``position`` 0, 1 and p
    _slot_mass        attention to the slot, mean over all queries; of kinds that have one

alpha_k = mean over queries i >= k of P[i, k], itself included, whatever the mask shows them; mean
over prompts, heads and (but where ``layer`` is that of the measurement) layers. Best keys are of
that mean. Of the sinks on key 0, (prompt, layer, head) whose alpha_0 > 0.3 in the baseline, every
other run has the

    _stayed_share     alpha_0 > 0.3 still
    _moved_share      alpha_0 <= 0.3, and alpha_k > 0.3 of another key of the first half
    _died_share       neither; what went to a slot counts as died

which add up to 1, and are left out where the baseline has no such sink.

A uniform head has alpha 0.074 on key 0, and on key 1 where key 0 is hidden. p's own query is all
p's where it sees itself alone: that adds up to 1 / (T - p) = 0.018 to p's alpha by itself, and a
hidden key 0 keeps 1 / T. A sink that comes from seeing nothing else gives p the alpha of 0. For
kinds that are no softmax P is the papers' proxy, whose rows may be empty. Slots stay visible under
every mask, so with one p never gives itself all. In a layer with a window, queries that are too far
to see a key count as 0.

Cost: 4 L + 3 forward passes over 16 prompts (1024 tokens), with attention matrices. 1.2 s of one
core for the CPU preset.

Axes: B rows, T query and S key positions, L layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.errors import require
from models.decoder import Decoder
from models.overrides import LayerOverride
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import (
    Trace,
    cut,
    everywhere,
    hide_first,
    hide_key,
    norm_ratio_B,
    see_itself_alone,
    trace,
    zero_at,
)

ROWS = 16
"""Prompts."""

POSITION = 8
"""p unless told: an ordinary position, far enough to have seen others and to be seen by most."""

LEADING_KEYS = 4
"""Leading keys whose alphas are given, beside p's."""

EPS = 0.3
"""alpha from which on a key is a sink (arXiv 2410.10781's)."""


def probe_interventions(
    decoder: Decoder, inputs: ProbeInputs, position: int = POSITION
) -> Iterator[Finding]:
    """The baseline and the interventions on position 0 and on ``position`` (see the module).

    Raises ``UserError`` unless ``position`` is one of the prompts' after 0.
    """
    name = inputs.natural()
    batch = cut(inputs.prompts[name], ROWS)
    last = batch.tokens_BT.shape[1] - 1
    known = isinstance(position, int) and 1 <= position <= last
    require(known, "position", f"must be between 1 and {last}", position)

    baseline = trace(decoder, batch)
    before_LBHS = key_alphas_LBHS(baseline)
    yield from _findings("baseline", name, baseline, before_LBHS, position)

    for kind, layer, overrides in _interventions(decoder, position):
        run = trace(decoder, batch, overrides)
        after_LBHS = key_alphas_LBHS(run)
        yield from _findings(kind, name, run, after_LBHS, position, layer)
        for fate, share in fate_shares(before_LBHS, after_LBHS).items():
            yield Finding(f"{kind}_{fate}_share", name, share, layer=layer)


def _interventions(
    decoder: Decoder, position: int
) -> Iterator[tuple[str, int, dict[int, LayerOverride]]]:
    """Name, layer (-1: all) and overrides of each."""
    yield "hidden_first", -1, everywhere(decoder, mask=hide_first)
    yield "hidden_other", -1, everywhere(decoder, mask=hide_key(position))
    alone = LayerOverride(mask=see_itself_alone(position))
    for layer in range(len(decoder.blocks)):
        yield "self_only", layer, {block: alone for block in range(layer + 1)}
        yield "self_only_one_block", layer, {layer: alone}
        for which, at in (("first", 0), ("other", position)):
            zeroed = LayerOverride(feed_forward_output=zero_at(at))
            yield f"zeroed_ffn_{which}", layer, {layer: zeroed}


def key_alphas_LBHS(run: Trace) -> Tensor:
    """alpha of every key: mean over its and all later queries."""
    received_LBHS = torch.stack([p_BHTS.sum(-2) for p_BHTS in run.probabilities_BHTS])
    length = received_LBHS.shape[-1]
    return received_LBHS / torch.arange(length, 0, -1, device=received_LBHS.device)


def best_key(alpha_S: Tensor) -> tuple[float, int]:
    """Largest alpha among the first half of the keys, and which key has it; the first of equals."""
    best = alpha_S[: len(alpha_S) // 2].max(0)
    return best.values.item(), int(best.indices)


def fate_shares(before_LBHS: Tensor, after_LBHS: Tensor) -> dict[str, float]:
    """Shares of the sinks on key 0 that ``stayed``, ``moved`` and ``died``; {} if there is none.

    before_LBHS, after_LBHS: alphas of the baseline and under an intervention.
    """
    is_sink_LBH = before_LBHS[..., 0] > EPS
    if not is_sink_LBH.any():
        return {}
    half = after_LBHS.shape[-1] // 2
    stayed_LBH = after_LBHS[..., 0] > EPS
    other_LBH = (after_LBHS[..., 1:half] > EPS).any(-1)
    fates = {
        "stayed": stayed_LBH,
        "moved": ~stayed_LBH & other_LBH,
        "died": ~stayed_LBH & ~other_LBH,
    }
    return {fate: had_LBH[is_sink_LBH].double().mean().item() for fate, had_LBH in fates.items()}


def norm_ratio(run: Trace, position: int) -> float:
    """Largest over layers of the position's norm after the block over the others' median."""
    ratios = [norm_ratio_B(hidden_BTC, position).mean() for hidden_BTC in run.hidden_BTC[1:]]
    return torch.stack(ratios).max().item()


def _findings(
    kind: str, name: str, run: Trace, alpha_LBHS: Tensor, position: int, layer: int = -1
) -> Iterator[Finding]:
    """What every run gives; by measured layer too where ``layer`` is free to say so."""
    yield from _alphas(kind, name, alpha_LBHS.mean((0, 1, 2)), position, layer)
    if layer < 0:
        for measured, alpha_S in enumerate(alpha_LBHS.mean((1, 2))):
            yield from _alphas(kind, name, alpha_S, position, measured)
    for at in sorted({0, 1, position}):
        yield Finding(f"{kind}_norm_ratio", name, norm_ratio(run, at), layer=layer, position=at)
    masses = [mass_BHT.mean() for mass_BHT in run.slot_BHT if mass_BHT is not None]
    if masses:
        yield Finding(f"{kind}_slot_mass", name, torch.stack(masses).mean().item(), layer=layer)


def _alphas(kind: str, name: str, alpha_S: Tensor, position: int, layer: int) -> Iterator[Finding]:
    """alphas of the leading keys and of ``position``, and the best key's."""
    for key in sorted({*range(min(LEADING_KEYS, len(alpha_S))), position}):
        yield Finding(f"{kind}_alpha", name, alpha_S[key].item(), layer=layer, position=key)
    alpha, key = best_key(alpha_S)
    yield Finding(f"{kind}_best_alpha", name, alpha, layer=layer)
    yield Finding(f"{kind}_best_position", name, float(key), layer=layer)
