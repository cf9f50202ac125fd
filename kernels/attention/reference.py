"""What attention with statistics means, in plain PyTorch: other implementations must agree.

    s[i, j] = scale q_i.k_j - slope (i - j) + bias[bucket(i - j)]      -inf where j is hidden from i
    lse[i]  = log(sum_j exp s[i, j] + exp null[i])
    P[i, j] = exp(s[i, j] - lse[i])                out[i] = sum_j P[i, j] v_j

The null slot is the learned or fixed sink of arXiv 2410.10781 (a zero null logit is
softmax-off-by-one); slopes are ALiBi (arXiv 2108.12409); the relative bias is T5's
(arXiv 1910.10683). The attention matrix is written out: O(T S) memory a head. It takes any mask,
computes in fp64 for fp64 inputs and in fp32 for everything below, and is differentiable through
out, lse and the probabilities.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim, R buckets of relative distance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.attention.statistics import (
    Statistics,
    StatisticsLevel,
    statistics_of_probabilities,
)
from kernels.masks import DenseMask, IntervalMask

MAX_BIAS_DISTANCE = 128
"""Distance from which on all keys share the last bucket of the relative bias."""


def by_head(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_BHTD, k_BHSD and v_BHSE: each query head with its own key head, in fp32 or better."""
    dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    q_BHTD, k_BGSD, v_BGSE = (x.transpose(1, 2).to(dtype) for x in (q_BTHD, k_BSGD, v_BSGE))
    heads_per_group = q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BHSD = k_BGSD.repeat_interleave(heads_per_group, dim=1)
    return q_BHTD, k_BHSD, v_BGSE.repeat_interleave(heads_per_group, dim=1)


def reference_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    mask: IntervalMask | DenseMask,
    *,
    scale: float,
    null_logit_BHT: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    level: StatisticsLevel,
) -> tuple[Tensor, Tensor, Statistics | None, Tensor]:
    """Output, lse, statistics and probabilities ([B, H, T, S], the null slot left out)."""
    q_BHTD, k_BHSD, v_BHSE = by_head(q_BTHD, k_BSGD, v_BSGE)
    dtype = q_BHTD.dtype

    logits_BHTS = scale * (q_BHTD @ k_BHSD.mT)
    distance_TS = _distance_TS(q_BTHD.shape[1], q_BTHD.device)
    if slopes_H is not None:
        logits_BHTS = logits_BHTS - slopes_H.to(dtype)[:, None, None] * distance_TS
    if bias_HR is not None:
        bucket_TS = relative_bucket(distance_TS, bias_HR.shape[1])
        logits_BHTS = logits_BHTS + bias_HR.to(dtype)[:, bucket_TS]

    visible_B1TS = mask.dense_BTS()[:, None]
    is_empty_B1T = ~visible_B1TS.any(-1)
    logits_BHTS = torch.where(visible_B1TS, logits_BHTS, -torch.inf)
    slots_BHTS = logits_BHTS
    if null_logit_BHT is not None:
        slots_BHTS = torch.cat([slots_BHTS, null_logit_BHT[..., None].to(dtype)], dim=-1)
    # A row of -inf would make softmax NaN, and its gradient NaN even behind a later mask.
    slots_BHTS = torch.where(is_empty_B1T[..., None], 0.0, slots_BHTS)
    lse_BHT = torch.where(is_empty_B1T, -torch.inf, torch.logsumexp(slots_BHTS, dim=-1))
    slots_BHTS = torch.where(is_empty_B1T[..., None], 0.0, torch.softmax(slots_BHTS, dim=-1))
    null_mass_BHT = None
    probabilities_BHTS = slots_BHTS
    if null_logit_BHT is not None:
        probabilities_BHTS, null_mass_BHT = slots_BHTS[..., :-1], slots_BHTS[..., -1]
    out_BTHE = (probabilities_BHTS @ v_BHSE).transpose(1, 2).to(q_BTHD.dtype)

    statistics = None
    if level is not StatisticsLevel.off:
        statistics = statistics_of_probabilities(
            probabilities_BHTS, null_mass_BHT, logits_BHTS, mask.document_start_BT, level
        )
    return out_BTHE, lse_BHT, statistics, probabilities_BHTS


def relative_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """T5's unidirectional bucket of a distance i - j (arXiv 1910.10683), int64.

    The first half of the buckets holds one distance each, the second half grows by a constant
    factor up to ``MAX_BIAS_DISTANCE``; later keys (a negative distance) share bucket 0.
    """
    distance = distance.clamp(min=0)
    num_exact = num_buckets // 2
    # As T5 rounds it: in fp32, divided before it is multiplied.
    share = torch.log(distance.float().clamp(min=1) / num_exact) / math.log(
        MAX_BIAS_DISTANCE / num_exact
    )
    far = (num_exact + (share * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < num_exact, distance, far)


def _distance_TS(num_tokens: int, device: torch.device) -> Tensor:
    position_T = torch.arange(num_tokens, device=device)
    return position_T[:, None] - position_T
