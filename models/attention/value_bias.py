"""V bias: a learned vector added to each head's output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.key_bias import BIAS_STD
from models.attention.softmax import SoftmaxAttention


class ValueBiasAttention(SoftmaxAttention):
    """softmax(q k^T) (v + v*) = softmax(q k^T) v + v*, v* learned (arXiv 2410.10781, Table 4)."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=v_bias``."""

        shared: bool = False
        """Whether all heads share one bias."""

    def __init__(self, config, model):
        super().__init__(config, model)
        heads = 1 if config.shared else self.num_heads
        self.value_HE = nn.Parameter(BIAS_STD * torch.randn(heads, self.head_dim))

    def finish(self, out_BTHE: Tensor, x_BTC: Tensor) -> Tensor:
        return (out_BTHE + self.value_HE).to(out_BTHE.dtype)
