"""A sink token: a learned token before every row, which every query sees and nobody predicts.

A row of T tokens would become one of T + 1. But the sink token sees itself alone, whatever the row:
so the decoder carries one copy of it through the blocks, and in each layer its key and value are a
slot's. What comes out is the same, padding and document masks keep their meaning, and the kernels
run on T keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.base import LayerInputs
from models.attention.key_bias import scores_of_slot
from models.attention.softmax import Slot, SoftmaxAttention


class SinkTokenAttention(SoftmaxAttention):
    """softmax([q k_s; q k^T]) [v_s; v], s a learned token at position 0 (arXiv 2410.10781, Table 4;
    2309.17453). The row's tokens are at positions 1, 2, ...; attention to s is the null slot's,
    over the row's queries: without s's own, which is all its and which the paper's Sink_1 counts.
    """

    has_sink_token = True

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=sink_token``."""

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot:
        assert inputs.sink_11C is not None
        _, k_11GD, v_11GE = self.project(inputs.sink_11C)
        logit_BHT = scores_of_slot(q_BTHD, k_11GD[0, 0])
        if inputs.slopes_H is not None:
            slopes_H = inputs.slopes_H
            distance_T = torch.arange(1, q_BTHD.shape[1] + 1, device=slopes_H.device)
            logit_BHT = logit_BHT - slopes_H[:, None] * distance_T
        value_HE = v_11GE[0, 0].repeat_interleave(self.num_heads // self.num_groups, dim=0)
        return Slot(logit_BHT, value_HE)
