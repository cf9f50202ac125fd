"""Attention whose weights are a similarity of query and key, not a softmax: sigmoid and kin."""

from kernels.similarity.api import SimilarityOutput, similarity_attention
from kernels.similarity.similarities import Normalize, Similarity

__all__ = ["Normalize", "Similarity", "SimilarityOutput", "similarity_attention"]
