"""What attention measures about itself while it runs, and how key mass reaches the caller.

With P the attention probabilities over the keys and the null slot:

    first_mass[i]    = P[i, 0]                   document_mass[i] = P[i, document start of i]
    null_mass[i]     = P[i, null]                key_mass[k]      = sum_i P[i, k]
    entropy[i]       = -sum P[i] log P[i]        max_logit        = max score, null left out

Every one is 0 where the query can't see the key, and an empty row (padding) adds nothing, so

    sum_k key_mass + sum_i null_mass = number of non-empty queries      for each row and head.

The mean attention a key gets (the sink metric of arXiv 2410.10781) is key_mass over the number of
queries that see it, ``IntervalMask.queries_per_key_BS``.

Axes: B rows of the batch, T query positions, S key positions, H query heads.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor


class StatisticsLevel(StrEnum):
    """How much attention measures: nothing, everything but the entropy, or everything."""

    off = "off"
    basic = "basic"
    full = "full"


class Statistics(NamedTuple):
    """Detached tensors, fp32 (fp64 for fp64 inputs). Two of them may share memory.

    first_mass_BHT: attention each query pays to key 0.
    document_mass_BHT: attention each query pays to the first token of its own document.
    null_mass_BHT: attention each query pays to the null slot; None without one.
    key_mass_BHS: attention each key received, summed over queries; None if it goes to a tap.
    max_logit_BH: largest scaled score (biases included) of a visible key, -inf if there is none.
    entropy_BHT: entropy of each query's attention in nats, null slot included; None below ``full``.
    """

    first_mass_BHT: Tensor
    document_mass_BHT: Tensor
    null_mass_BHT: Tensor | None
    key_mass_BHS: Tensor | None
    max_logit_BH: Tensor
    entropy_BHT: Tensor | None


@torch.no_grad()
def statistics_of_probabilities(
    probabilities_BHTS: Tensor,
    null_mass_BHT: Tensor | None,
    logits_BHTS: Tensor,
    document_start_BT: Tensor,
    level: StatisticsLevel,
) -> Statistics:
    """The definitions above, read off the whole attention matrix.

    probabilities_BHTS: 0 where hidden. logits_BHTS: -inf where hidden.
    """
    entropy_BHT = None
    if level is StatisticsLevel.full:
        entropy_BHT = torch.special.entr(probabilities_BHTS).sum(-1)
        if null_mass_BHT is not None:
            entropy_BHT = entropy_BHT + torch.special.entr(null_mass_BHT)
    return Statistics(
        first_mass_BHT=probabilities_BHTS[..., 0].clone(),
        document_mass_BHT=mass_at(probabilities_BHTS, document_start_BT),
        null_mass_BHT=None if null_mass_BHT is None else null_mass_BHT.detach(),
        key_mass_BHS=probabilities_BHTS.sum(2),
        max_logit_BH=logits_BHTS.amax((2, 3)),
        entropy_BHT=entropy_BHT,
    )


def mass_at(probabilities_BHTS: Tensor, key_BT: Tensor) -> Tensor:
    """The attention each query pays to one key of its own, 0 for a key outside 0, ..., S - 1."""
    num_keys = probabilities_BHTS.shape[-1]
    exists_BT = (key_BT >= 0) & (key_BT < num_keys)
    index_BHT1 = (
        (key_BT * exists_BT)
        .long()[:, None, :, None]
        .expand(-1, probabilities_BHTS.shape[1], -1, -1)
    )
    return probabilities_BHTS.gather(3, index_BHT1).squeeze(3) * exists_BT[:, None]


def null_mass(null_logit_BHT: Tensor, lse_BHT: Tensor) -> Tensor:
    """exp(null - lse), 0 in an empty row (lse -inf)."""
    is_empty_BHT = lse_BHT == -torch.inf
    return torch.exp(null_logit_BHT - lse_BHT.masked_fill(is_empty_BHT, torch.inf))


class _DeliverKeyMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_BTHE, lse_BHT, tap_BHS, key_mass_BHS):
        ctx.save_for_backward(key_mass_BHS)
        ctx.set_materialize_grads(False)
        return out_BTHE.view_as(out_BTHE), lse_BHT.view_as(lse_BHT)

    @staticmethod
    def backward(ctx, grad_out_BTHE, grad_lse_BHT):
        (key_mass_BHS,) = ctx.saved_tensors
        return grad_out_BTHE, grad_lse_BHT, key_mass_BHS, None


def deliver_key_mass(
    out_BTHE: Tensor, lse_BHT: Tensor, statistics: Statistics, tap_BHS: Tensor
) -> tuple[Tensor, Tensor, Statistics]:
    """Pass out and lse through, and make the key mass the tap's gradient in the backward pass.

    What leaves as a gradient is counted once under activation checkpointing, where the forward
    runs twice, and an implementation may compute it in its backward pass.
    """
    out_BTHE, lse_BHT = _DeliverKeyMass.apply(out_BTHE, lse_BHT, tap_BHS, statistics.key_mass_BHS)
    # Not `_replace`: compiled code can't return what it makes in every supported PyTorch.
    delivered = Statistics(
        first_mass_BHT=statistics.first_mass_BHT,
        document_mass_BHT=statistics.document_mass_BHT,
        null_mass_BHT=statistics.null_mass_BHT,
        key_mass_BHS=None,
        max_logit_BH=statistics.max_logit_BH,
        entropy_BHT=statistics.entropy_BHT,
    )
    return out_BTHE, lse_BHT, delivered
