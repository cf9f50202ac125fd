"""Linear attention with learned feature maps."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.similarity import Normalize, Similarity
from models.attention.similarity import SimilarityAttention


class MlpKernelAttention(SimilarityAttention):
    """sim = mlp(q) mlp(k)^T / sqrt(D), N_i = max(|sum_j sim|, 1) (arXiv 2410.10781, Table 6).

    mlp(x) = W_2 gelu(W_1 x) of the head dim's width, the same for queries, keys and heads: the
    paper's notes give no sizes.
    """

    similarity = Similarity.identity
    normalizer = Normalize.clamped_sum

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=mlp_kernel``."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.map_inner = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.map_outer = nn.Linear(self.head_dim, self.head_dim, bias=False)

    def features(self, q_BTHD: Tensor, k_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        q_BTHD, k_BTGD = (self.map_outer(F.gelu(self.map_inner(x))) for x in (q_BTHD, k_BTGD))
        return q_BTHD, k_BTGD
