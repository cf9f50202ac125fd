"""Attention by elu + 1 of the score."""

from dataclasses import dataclass

from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention


class EluScoreAttention(SimilarityAttention):
    """sim = elu(q k / sqrt(D)) + 1 (arXiv 2410.10781, Table 6)."""

    similarity = Similarity.elu

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=elu_score``."""
