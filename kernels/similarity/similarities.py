"""The similarities, what may divide them, and the two numbers of their definitions."""

from __future__ import annotations

from enum import StrEnum


class Similarity(StrEnum):
    """f(x), the weight of a key with score x before anything divides it.

    identity: x. sigmoid: 1 / (1 + e^-x). elu: elu(x) + 1. softpick: relu(e^x - 1).
    """

    identity = "identity"
    sigmoid = "sigmoid"
    elu = "elu"
    softpick = "softpick"


class Normalize(StrEnum):
    """N_i, what divides the weights of query i.

    none: 1. sum: sum_j f(x_ij); softpick's is sum_j |e^x_ij - 1| + ``EPSILON``.
    clamped_sum: max(|sum_j f(x_ij)|, 1), for weights that may be negative.
    """

    none = "none"
    sum = "sum"
    clamped_sum = "clamped_sum"


ALLOWED = {
    "identity": ("none", "sum", "clamped_sum"),
    "sigmoid": ("none", "sum"),
    "elu": ("none", "sum"),
    "softpick": ("sum",),
}
"""By similarity, what may divide it. identity by its sum: the caller promises positive scores."""

EPSILON = 1e-6
"""Added to softpick's sum (arXiv 2504.20966)."""

SMALLEST_SUM = 1e-30
"""A sum of weights below this counts as 0, the same in every dtype: what it divides is 0. Its
reciprocal still is a number of fp32, so that no gradient is infinite times 0."""
