"""K bias and KV bias: a learned key, and a value for it, that every query sees.

Axes: G key and value heads, or 1 that all share; D head dim of queries and keys, E of values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.errors import require
from models.attention.base import LayerInputs
from models.attention.softmax import Slot, SoftmaxAttention
from models.norms import at_least_fp32

BIAS_STD = 0.02
"""Biases start as N(0, 0.02^2), in the released code of arXiv 2410.10781."""


def scores_of_slot(q_BTHD: Tensor, key_GD: Tensor) -> Tensor:
    """q_i . k* / sqrt(D) of a key of its own for each key head or one for all, fp32, [B, H, T].

    k* is at position 0, where rope turns nothing; slopes leave it alone.
    """
    group_size = q_BTHD.shape[2] // key_GD.shape[0]
    key_HD = at_least_fp32(key_GD).repeat_interleave(group_size, dim=0)
    scores_BTH = (at_least_fp32(q_BTHD) * key_HD).sum(-1) * q_BTHD.shape[-1] ** -0.5
    return scores_BTH.transpose(1, 2)


class KeyBiasAttention(SoftmaxAttention):
    """K bias: softmax([q k*; q k^T]) [0; v], k* learned for each head (arXiv 2410.10781, Table 4).

    Attention to k* fetches nothing.
    """

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=k_bias``."""

        shared: bool = False
        """Whether all heads share one bias."""

        learned_dims: int | None = None
        """First dimensions of the key that are learned, the others being 0; null = all."""

        def __post_init__(self):
            super().__post_init__()
            valid = self.learned_dims is None or self.learned_dims >= 1
            require(valid, "attention.learned_dims", "must be >= 1 or null", self.learned_dims)

    config: Config

    def __init__(self, config: Config, model):
        super().__init__(config, model)
        dims = config.learned_dims or self.head_dim
        allowed = f"must be at most the head dim {self.head_dim}"
        require(dims <= self.head_dim, "attention.learned_dims", allowed, config.learned_dims)
        self.key_GD = self.bias(dims)

    def bias(self, dims: int) -> nn.Parameter:
        """A bias of so many dimensions for each key head, or for all."""
        heads = 1 if self.config.shared else self.num_groups
        return nn.Parameter(BIAS_STD * torch.randn(heads, dims))

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot:
        # Dimensions that aren't learned are 0 and add nothing, but count in sqrt(D).
        dims = self.key_GD.shape[1]
        scale = (dims / self.head_dim) ** 0.5
        return Slot(scores_of_slot(q_BTHD[..., :dims], self.key_GD) * scale)


class KeyValueBiasAttention(KeyBiasAttention):
    """KV bias: softmax([q k*; q k^T]) [v*; v], k* and v* learned (arXiv 2410.10781, Table 4)."""

    @dataclass(kw_only=True)
    class Config(KeyBiasAttention.Config):
        """Settings of ``attention=kv_bias``."""

        value_norm: float | None = None
        """Length of v* = value_norm (1, 0, ..., 0), which isn't learned then; null = learned."""

        def __post_init__(self):
            super().__post_init__()
            valid = self.value_norm is None or self.value_norm >= 0
            require(valid, "attention.value_norm", "must be >= 0 or null", self.value_norm)

    config: Config

    def __init__(self, config: Config, model):
        super().__init__(config, model)
        self.value_GE = self.bias(self.head_dim) if config.value_norm is None else None

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot:
        slot = super().slot(q_BTHD, inputs)
        if self.value_GE is None:
            value_HE = slot.logit.new_zeros(self.num_heads, self.head_dim)
            value_HE[:, 0] = self.config.value_norm
        else:
            value_HE = self.value_GE.repeat_interleave(
                self.num_heads // self.value_GE.shape[0], dim=0
            )
        return slot._replace(value_HE=value_HE)
