"""What noise can tell: quantiles of Student's t, and the smallest effect that shows.

Two arms of n and m seeds differ by an effect that a two-sided test at 5 % finds four times in five
if it is at least

    (t_{0.975, v} + t_{0.8, v}) sd sqrt(1 / n + 1 / m)

with sd the seed-to-seed standard deviation and v its degrees of freedom. Pairing seeds can only
help, and isn't counted on.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

LEVEL, POWER = 0.05, 0.8


@cache
def t_quantile(share: float, degrees: int) -> float:
    """The value below which Student's t of ``degrees`` lies with probability ``share``.

    With t = sqrt(v) tan(a) its density is cos(a)^(v - 1), which is summed on a fine grid.
    """
    assert 0 < share < 1 and degrees >= 1
    edges = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    weights = np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    return math.sqrt(degrees) * math.tan(float(np.interp(share, below, edges)))


def smallest_effect(sd: float, degrees: int, n: int, m: int) -> float:
    """The smallest difference of two arms' means that can be told; see the module."""
    quantiles = t_quantile(1 - LEVEL / 2, degrees) + t_quantile(POWER, degrees)
    return quantiles * sd * math.sqrt(1 / n + 1 / m)
