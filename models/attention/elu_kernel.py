"""Linear attention with the feature map elu + 1."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention


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
        return F.elu(q_BTHD) + 1, F.elu(k_BTGD) + 1
