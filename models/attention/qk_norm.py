"""QK-norm: queries and keys of each head are normed before the position encoding."""

from dataclasses import dataclass

from torch import Tensor

from models.attention.softmax import SoftmaxAttention
from models.norms import RMSNorm


class QKNormAttention(SoftmaxAttention):
    """softmax(norm(q) norm(k)^T / sqrt(D)) v, RMSNorm with a weight that heads share (after
    arXiv 2010.04245, whose norm is l2 with a learned scale, and 2302.05442, whose is LayerNorm)."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=qk_norm``."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.query_norm = RMSNorm(self.head_dim, model.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, model.norm_eps)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTGD, v_BTGE = super().project(x_BTC)
        return self.query_norm(q_BTHD), self.key_norm(k_BTGD), v_BTGE
