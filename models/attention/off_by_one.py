"""Softmax-off-by-one: a slot whose score is always 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.base import LayerInputs
from models.attention.softmax import Slot, SoftmaxAttention


class OffByOneAttention(SoftmaxAttention):
    """A_ij = exp(s_ij) / (1 + sum_k exp(s_ik)) (arXiv 2410.17174)."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=off_by_one``."""

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot:
        return Slot(torch.zeros(self.num_heads, dtype=torch.float32, device=q_BTHD.device))
