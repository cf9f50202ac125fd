"""Linear attention with the feature map elu + 1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention
from models.norms import at_least_fp32


class EluKernelAttention(SimilarityAttention):
    """sim = (elu(q) + 1) (elu(k) + 1)^T (arXiv 2006.16236; 2410.10781, Table 6)."""

    similarity = Similarity.identity
    scale = 1.0
    # A slope would make sums of 0 and below of features that are positive.
    takes_slopes = False

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=elu_kernel``."""

    def features(self, q_BTHD: Tensor, k_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(q_BTHD), self._map(k_BTGD)

    def _map(self, x: Tensor) -> Tensor:
        # elu(x) + 1 would round exp(x) to a multiple of 1's precision, in bf16 to 0 from -7 on.
        below = torch.exp(at_least_fp32(x).clamp(max=0))
        return torch.where(x < 0, below, at_least_fp32(x) + 1).to(x.dtype)
