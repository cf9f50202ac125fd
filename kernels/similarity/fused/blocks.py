"""The similarities on a tile of scores, and what else the kernels share.

Scores are in units of log 2 (x = s log2 e), since the hardware's exponential is 2**x; identity's,
which takes none, are as they are. With softpick, L stands for log2 N.

Axes: M query rows and N keys of a tile, D query/key head dim.
"""

import triton
import triton.language as tl

from kernels.attention.fused.blocks import LN_2, LOG2_E, NEVER
from kernels.similarity import similarities

EPSILON = tl.constexpr(similarities.EPSILON)
SMALLEST_SUM = tl.constexpr(similarities.SMALLEST_SUM)


@triton.jit
def unit_of(SIMILARITY: tl.constexpr):
    """What turns a score into the kernels' unit."""
    if SIMILARITY == "identity":
        unit: tl.constexpr = 1.0
    else:
        unit: tl.constexpr = LOG2_E
    return unit


@triton.jit
def hidden_score(SIMILARITY: tl.constexpr):
    """A score whose weight is exactly 0: that of a hidden key.

    Finite, since Triton's products take it along. 2**(0 - m) - 2**-m is what softpick makes of 0.
    """
    if SIMILARITY == "identity" or SIMILARITY == "softpick":
        score: tl.constexpr = 0.0
    else:
        score: tl.constexpr = NEVER
    return score


@triton.jit
def similarity_of(x, SIMILARITY: tl.constexpr):
    """f of the scores; not softpick's, which is relative to a row's largest score."""
    if SIMILARITY == "sigmoid":
        # 1 / (1 + e^-x); a division would also care for denominators near the largest number.
        root = tl.rsqrt(1.0 + tl.exp2(-x))
        x = root * root
    elif SIMILARITY == "elu":
        # e^x below 0 and x + 1 above, without a choice.
        x = tl.exp2(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0) * LN_2
    return x


@triton.jit
def score_gradients(x, dp, norm, shift, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr):
    """f'(x) (dp / N - c), not softpick's. norm: 1 / N; shift: c."""
    gradients = dp
    if NORMALIZE != "none":
        gradients = dp * norm - shift
    if SIMILARITY == "sigmoid":
        f = similarity_of(x, SIMILARITY)
        gradients *= f - f * f
    elif SIMILARITY == "elu":
        gradients *= tl.exp2(tl.minimum(x, 0.0))
    return gradients


@triton.jit
def softpick_gradients(power, base, dp, shift):
    """softpick's f'(x) dp / N - g'(x) c, with power = e^x / N, base = 1 / N and shift = c N.

    power against base tells x's sign, so that nobody keeps x; a hidden score's 0 makes them equal.
    """
    return power * tl.where(power > base, dp - shift, tl.where(power < base, shift, 0.0))


@triton.jit
def reciprocal_of_sum(x):
    """1 / x, 0 where x counts as 0."""
    divides = tl.abs(x) >= SMALLEST_SUM
    return tl.where(divides, 1.0 / tl.where(divides, x, 1.0), 0.0)


@triton.jit
def lane_maxima(x):
    """[rows, n] -> [rows, 8], whose maximum is the row's: see ``lane_sums``."""
    return tl.max(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)
