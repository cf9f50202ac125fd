"""Attention by the score itself."""

from dataclasses import dataclass

from kernels.similarity import Normalize, Similarity
from models.attention.similarity import SimilarityAttention


class IdentityKernelAttention(SimilarityAttention):
    """sim = q k / sqrt(D), of either sign; N_i = max(|sum_j sim|, 1) (2410.10781, Table 6)."""

    similarity = Similarity.identity
    normalizer = Normalize.clamped_sum

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=identity_kernel``."""
