"""Plain softmax attention, and the base of every kind that adds a null slot, a bias or a gate."""

from dataclasses import dataclass

from torch import Tensor

from kernels.attention import AttentionOutput, sink_attention
from kernels.masks import DenseMask, IntervalMask
from models.attention.base import Attention, AttentionConfig


class SoftmaxAttention(Attention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(D)) v_j over i's visible keys (arXiv 1706.03762)."""

    @dataclass(kw_only=True)
    class Config(AttentionConfig):
        """Settings of ``attention=softmax``."""

    def attend(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        mask: IntervalMask | DenseMask,
        **kernel,
    ) -> AttentionOutput:
        return sink_attention(q_BTHD, k_BTGD, v_BTGE, mask, **kernel)
