"""Norms of the residual stream: one class and one line in ``NORMS`` each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or as it is in fp64: the precision of every norm, sum of squares and angle."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, arXiv
    1910.07467), computed in fp32 or better and returned in x's dtype.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (Ba et al., arXiv
    1607.06450), computed in fp32 or better and returned in x's dtype.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
        return F.layer_norm(at_least_fp32(x), weight.shape, weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
"""``model.norm``: classes built from (width, eps) that map [..., width] to the same shape."""
