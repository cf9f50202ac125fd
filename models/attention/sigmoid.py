"""Sigmoid attention."""

from dataclasses import dataclass

from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention


class SigmoidAttention(SimilarityAttention):
    """sim = 1 / (1 + exp(-q k / sqrt(D))) (arXiv 2410.10781, Table 6; 2409.04431 without N)."""

    similarity = Similarity.sigmoid

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=sigmoid``."""
