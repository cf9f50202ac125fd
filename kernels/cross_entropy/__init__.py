"""Cross-entropy of a linear layer's logits."""

from kernels.cross_entropy.api import IGNORE_LABEL, linear_cross_entropy

__all__ = ["IGNORE_LABEL", "linear_cross_entropy"]
