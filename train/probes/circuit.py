"""The position-zero circuit: where along the layers position 0 separates (arXiv 2603.06591).

Position 0 sees itself alone, so its attention output is larger than an average over many; the
feed-forward makes that a large norm, on which later heads rest. Measured after each half of each
block l, on ``text``, ``bos_text`` and ``random``:

    norm_ratio_embedding            ||h_0|| over the median norm of the prompt's other positions
    norm_ratio_after_attention      the same after the attention of layer l
    norm_ratio_after_feed_forward   the same after the feed-forward: the state after the block
    norm_jump_attention, norm_jump_feed_forward
                                    what that half adds to the ratio (negative: takes from it)
    norm_jump                       peak - ratio of the embedding, the peak over the layers' ends
    norm_jump_share_of_first_two    (largest ratio at the end of layers 0, 1 - embedding) / jump;
                                    1: the circuit is in the first two blocks; negative: they only
                                    shrink the ratio; left out where there is no jump > 0
    separability_embedding, separability_after_attention, separability_after_feed_forward
                                    balanced accuracy of a linear probe; 0.5 is chance
    stability_embedding, stability_after_attention, stability_after_feed_forward
                                    mean cosine of the states of one position in different prompts,
                                    at position 0 and, beside it, at position 8

Ratios are means over prompts. Under ``model.norm_place=after`` states are normed, so the ratio says
nothing there. The share of a jump near 0 is noise: read it beside ``norm_jump``.

The probe: position 0 against positions >= 4, Fisher's discriminant with equal class weights, w =
(S + 0.1 diag(S))^-1 (m_0 - m_1), S the mean of the classes' covariances, threshold midway between
the means; fitted on the even prompts, accuracy on the odd. Positions 1 to 3 are left out,
as they see few others too.

Tokens alone can tell position 0 apart and make it stable: many prompts of ``text`` begin documents,
whose first words are like no others. How much tokens alone give is what ``separability_embedding``
and ``stability_embedding`` show, before any attention (learned or sinusoidal positions are in them
too). Those of ``random`` are drawn alike at every position, so the embedded tokens are at chance
there and what the blocks add is position's doing. Read ``text`` beside it.

``bos_text`` has no stability: a BOS at position 0 sees only itself and is the same in all prompts,
so its cosine is 1 and its separability trivial, in any model.

Cost: one forward pass of each of the three inputs on the first 64 prompts, with attention matrices,
and 2 L + 1 linear systems of size C for each. 1.0 s of one core for the CPU preset.

Axes: B rows, T positions, N samples, C width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.decoder import Decoder
from models.norms import at_least_fp32
from train.probes.base import Finding, ProbeInputs
from train.probes.mixing import pairwise_cosine
from train.probes.trace import Trace, cut, norm_ratio_B, trace

ROWS = 64
"""Prompts of each input."""

FIRST_OTHER = 4
"""Position from which on the linear probe counts positions as ordinary."""

CONTROL = 8
"""Ordinary position whose stability stands beside that of position 0."""

SHRINKAGE = 0.1
"""Share of each variance that is added to it, as there are fewer prompts than C. Each its own: the
mean would be that of the few dimensions with massive activations."""


def probe_circuit(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """Norm jumps, separability and stability of position 0 (see the module's docstring)."""
    for name in ("text", "bos_text", "random"):
        if name not in inputs.prompts:
            continue
        run = trace(decoder, cut(inputs.prompts[name], ROWS))
        yield from norm_jumps(run, name)
        for place, layer, hidden_BTC in _places(run):
            accuracy = separability(hidden_BTC)
            if accuracy is not None:
                yield Finding(f"separability_{place}", name, accuracy, layer=layer)
            if name == "bos_text" or len(hidden_BTC) < 2:
                continue
            for position in (0, CONTROL):
                cosine = pairwise_cosine(at_least_fp32(hidden_BTC[None, :, position])).item()
                yield Finding(f"stability_{place}", name, cosine, layer=layer, position=position)


def _places(run: Trace) -> Iterator[tuple[str, int, Tensor]]:
    """Name, layer and states of the embedding and of each half block, in their order."""
    yield "embedding", -1, run.hidden_BTC[0]
    for layer, middle_BTC in enumerate(run.middle_BTC):
        yield "after_attention", layer, middle_BTC
        yield "after_feed_forward", layer, run.hidden_BTC[layer + 1]


def norm_jumps(run: Trace, name: str) -> Iterator[Finding]:
    """The norm ratio along the half blocks, its jumps, and the first two blocks' share."""
    last = None
    ends = []
    for place, layer, hidden_BTC in _places(run):
        ratio = norm_ratio_B(hidden_BTC, 0).mean().item()
        yield Finding(f"norm_ratio_{place}", name, ratio, layer=layer)
        if last is not None:
            half = place.removeprefix("after_")
            yield Finding(f"norm_jump_{half}", name, ratio - last, layer=layer)
        if place != "after_attention":
            ends.append(ratio)
        last = ratio
    embedded, *after = ends
    jump = max(after) - embedded
    yield Finding("norm_jump", name, jump)
    if jump > 0:
        share = (max(after[:2]) - embedded) / jump
        yield Finding("norm_jump_share_of_first_two", name, share)


def separability(hidden_BTC: Tensor) -> float | None:
    """Balanced accuracy of the linear probe on unseen prompts; None for fewer than two prompts.

    A state on the threshold is half right, so where the classes are one point it is 0.5.
    """
    if len(hidden_BTC) < 2:
        return None
    first_NC, others_NC = _classes(hidden_BTC[::2])
    covariance_CC = (_covariance(first_NC) + _covariance(others_NC)) / 2
    variance_C = covariance_CC.diagonal()
    # Dimensions that don't vary are divided by something, and all of them by 1 if none varies.
    least = torch.where(variance_C.any(), 1e-9 * variance_C.mean(), 1.0)
    system_CC = covariance_CC + (SHRINKAGE * variance_C + least).diag()
    difference_C = first_NC.mean(0) - others_NC.mean(0)
    weight_C = torch.linalg.solve(system_CC, difference_C)
    threshold = (first_NC.mean(0) + others_NC.mean(0)) @ weight_C / 2
    unseen_first_NC, unseen_others_NC = _classes(hidden_BTC[1::2])
    sign_first_N = (unseen_first_NC @ weight_C - threshold).sign()
    sign_others_N = (unseen_others_NC @ weight_C - threshold).sign()
    return ((2 + sign_first_N.mean() - sign_others_N.mean()) / 4).item()


def _classes(hidden_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """States of position 0 and of ordinary positions, fp64: outliers square in a covariance."""
    hidden_BTC = hidden_BTC.double()
    return hidden_BTC[:, 0], hidden_BTC[:, FIRST_OTHER:].flatten(0, 1)


def _covariance(x_NC: Tensor) -> Tensor:
    rest_NC = x_NC - x_NC.mean(0)
    return rest_NC.mT @ rest_NC / len(x_NC)
