"""What similarity attention means, in plain PyTorch: the kernels must agree.

    x[i, j] = scale q_i.k_j - slope (i - j)           over the keys j that query i sees
    out[i]  = sum_j f(x[i, j]) v_j / N[i]             P[i, j] = |f(x[i, j])| / sum_j |f(x[i, j])|

f and N are ``Similarity`` and ``Normalize``. P, the share of the absolute weight that a key gets,
is what the papers call the attention of such kinds (arXiv 2410.10781); N takes no part in it. Where
a sum is below ``SMALLEST_SUM``, what it divides is 0, as in an empty row.

The matrix is written out: O(T S) memory a head. It takes any mask, computes in fp64 for fp64 inputs
and in fp32 for everything below; out is differentiable.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import by_head
from kernels.attention.statistics import Statistics, StatisticsLevel, statistics_of_probabilities
from kernels.masks import DenseMask, IntervalMask
from kernels.similarity.similarities import EPSILON, SMALLEST_SUM, Normalize, Similarity


def reference_similarity(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    *,
    similarity: Similarity,
    normalize: Normalize,
    scale: float,
    bias: float,
    slopes_H: Tensor | None,
    level: StatisticsLevel,
) -> tuple[Tensor, Tensor, Statistics | None, Tensor]:
    """Output, row sums of the absolute weights, statistics and P, [B, H, T, S]."""
    q_BHTD, k_BHSD, v_BHSE = by_head(q_BTHD, k_BTGD, v_BTGE)
    dtype = q_BHTD.dtype

    x_BHTS = scale * (q_BHTD @ k_BHSD.mT) + bias
    if slopes_H is not None:
        position_T = torch.arange(q_BTHD.shape[1], device=q_BTHD.device)
        distance_TS = position_T[:, None] - position_T
        x_BHTS = x_BHTS - slopes_H.to(dtype)[:, None, None] * distance_TS
    visible_B1TS = mask.dense_BTS()[:, None]
    if similarity is Similarity.softpick:
        weights_BHTS = _softpick(x_BHTS, visible_B1TS)
        size_BHTS = weights_BHTS
    else:
        f_BHTS = torch.where(visible_B1TS, _similarity(x_BHTS, similarity), 0.0)
        weights_BHTS = _normalized(f_BHTS, normalize)
        size_BHTS = f_BHTS.abs()
    out_BTHE = (weights_BHTS @ v_BHSE).transpose(1, 2).to(q_BTHD.dtype)

    with torch.no_grad():
        size_BHTS = size_BHTS.detach()
        probabilities_BHTS = _normalized(size_BHTS, Normalize.sum)
        statistics = None
        if level is not StatisticsLevel.off:
            statistics = statistics_of_probabilities(
                probabilities_BHTS,
                None,
                x_BHTS.masked_fill(~visible_B1TS, -torch.inf),
                mask.document_start_BT,
                level,
            )
    return out_BTHE, size_BHTS.sum(-1), statistics, probabilities_BHTS


def _similarity(x: Tensor, similarity: Similarity) -> Tensor:
    if similarity is Similarity.sigmoid:
        return torch.sigmoid(x)
    if similarity is Similarity.elu:
        # Not elu(x) + 1, which loses e^x to the 1. The branch not taken must be finite.
        return torch.where(x < 0, torch.exp(torch.where(x < 0, x, 0.0)), x + 1)
    return x


def _normalized(f_BHTS: Tensor, normalize: Normalize) -> Tensor:
    if normalize is Normalize.none:
        return f_BHTS
    sum_BHT1 = f_BHTS.sum(-1, keepdim=True)
    if normalize is Normalize.clamped_sum:
        # Not ``clamp``, whose derivative at the bound is 1.
        return f_BHTS / torch.where(sum_BHT1.abs() > 1, sum_BHT1.abs(), 1.0)
    divides_BHT1 = sum_BHT1.abs() >= SMALLEST_SUM
    # A sum of 0 would make the gradient NaN even behind a later mask.
    quotient_BHTS = f_BHTS / torch.where(divides_BHT1, sum_BHT1, 1.0)
    return torch.where(divides_BHT1, quotient_BHTS, 0.0)


def _softpick(x_BHTS: Tensor, visible_B1TS: Tensor) -> Tensor:
    """relu(e^x - 1) / (sum |e^x - 1| + epsilon), both times e^-m, so that nothing overflows."""
    x_BHTS = torch.where(visible_B1TS, x_BHTS, 0.0)
    top_BHT1 = x_BHTS.detach().amax(-1, keepdim=True).clamp(min=0)
    # |e^x - 1| e^-m = (1 - e^-|x|) e^(max(x, 0) - m), without a difference of equal numbers.
    size_BHTS = -torch.expm1(-x_BHTS.abs()) * torch.exp(x_BHTS.clamp(min=0) - top_BHT1)
    sum_BHT1 = size_BHTS.sum(-1, keepdim=True) + EPSILON * torch.exp(-top_BHT1)
    return torch.where(x_BHTS > 0, size_BHTS, 0.0) / sum_BHT1
