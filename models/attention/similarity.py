"""Attention whose weights are a similarity of query and key instead of a softmax.

The base of kinds that differ in the similarity: of the score, or of feature maps of queries and
keys (linear attention). Both families are those of arXiv 2410.10781, section 7 and Table 6.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.similarity import Normalize, Similarity, SimilarityOutput, similarity_attention
from models.attention.base import Attention, AttentionConfig, LayerInputs


class SimilarityAttention(Attention):
    """out_i = sum_j sim(q_i, k_j) v_j / N_i over i's visible keys.

    similarity: f, of which sim is f(q_i k_j / sqrt(D) + bias), bias 0 but in kinds that set it.
    normalizer: N_i where the setting asks for one; else it is 1. Statistics are of |sim| / sum_j
    |sim|, the papers' proxy.
    """

    @dataclass(kw_only=True)
    class Config(AttentionConfig):
        """Settings that similarity kinds share."""

        normalize: bool = False
        """Whether a query's weights are divided by their sum."""

    config: Config
    bias: float = 0.0
    alpha_kind = "proxy"
    similarity: ClassVar[Similarity]
    normalizer: ClassVar[Normalize] = Normalize.sum
    scale: ClassVar[float | None] = None

    def features(self, q_BTHD: Tensor, k_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """What the similarity is of: queries and keys after the position encoding, or maps."""
        return q_BTHD, k_BTGD

    def attend(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        inputs: LayerInputs,
        implementation: str,
    ) -> SimilarityOutput:
        q_BTHD, k_BTGD = self.features(q_BTHD, k_BTGD)
        return similarity_attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            inputs.mask,
            similarity=self.similarity,
            normalize=self.normalizer if self.config.normalize else Normalize.none,
            scale=self.scale,
            bias=self.bias,
            slopes_H=inputs.slopes_H,
            statistics=inputs.statistics,
            key_mass_tap_BHS=inputs.key_mass_tap_BHS,
            implementation=implementation,
        )
