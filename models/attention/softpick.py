"""Softpick: a rectified softmax."""

from dataclasses import dataclass

from kernels.errors import require
from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention


class SoftpickAttention(SimilarityAttention):
    """weights_ij = relu(exp(s_ij) - 1) / (sum_k |exp(s_ik) - 1| + 1e-6) (arXiv 2504.20966)."""

    similarity = Similarity.softpick

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=softpick``."""

        normalize: bool = True
        """Always: softpick is defined with its sum."""

        def __post_init__(self):
            super().__post_init__()
            require(self.normalize, "attention.normalize", "must be true for softpick", False)
