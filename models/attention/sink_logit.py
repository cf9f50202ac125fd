"""A learned sink logit: a slot with one learned score a head, as in gpt-oss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.base import LayerInputs
from models.attention.softmax import Slot, SoftmaxAttention


class SinkLogitAttention(SoftmaxAttention):
    """A_ij = exp(s_ij) / (exp(b_h) + sum_k exp(s_ik)), b learned from 0 (arXiv 2508.10925)."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=sink_logit``."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.logit_H = nn.Parameter(torch.zeros(model.num_heads))

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot:
        return Slot(self.logit_H)
