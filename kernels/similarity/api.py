"""``similarity_attention``: checks its inputs, picks an implementation, returns what it gives.

Axes: B rows of the batch, T query positions, S key positions (S = T), H query heads, G key/value
heads (H is a multiple of G), D query/key head dim, E value head dim.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.checks import (
    HAS_TRITON,
    check_slopes,
    check_tap,
    check_tensors,
    checked_number,
    checked_scale,
    level_of,
    why_not_triton,
)
from kernels.attention.statistics import Statistics, StatisticsLevel, deliver_key_mass
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask
from kernels.similarity.reference import reference_similarity
from kernels.similarity.similarities import ALLOWED, Normalize, Similarity

if HAS_TRITON:
    from kernels.similarity.fused.op import fused_similarity

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "triton")

# Read once: compiled code can't iterate over an enumeration in every supported PyTorch.
_SIMILARITIES = {similarity.value: similarity for similarity in Similarity}
_NORMALIZATIONS = {normalize.value: normalize for normalize in Normalize}
_logged_choices: set[str] = set()


class SimilarityOutput(NamedTuple):
    """out_BTHE in q's dtype, which alone is differentiable; row_abs_sum_BHT, fp32 (fp64 for fp64
    inputs), see ``similarity_attention``; statistics, None at level ``off``; and
    probabilities_BHTS, the matrix P that they are read off, ``reference`` only.
    """

    out_BTHE: Tensor
    row_abs_sum_BHT: Tensor
    statistics: Statistics | None
    probabilities_BHTS: Tensor | None


def similarity_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    *,
    similarity: Similarity | str,
    normalize: Normalize | str,
    scale: float | None = None,
    bias: float = 0.0,
    slopes_H: Tensor | None = None,
    statistics: StatisticsLevel | str = StatisticsLevel.basic,
    key_mass_tap_BHS: Tensor | None = None,
    implementation: str = "auto",
) -> SimilarityOutput:
    """Attention under ``mask`` with weights that no softmax makes (arXiv 2410.10781).

        x_ij = scale q_i.k_j + bias - slope (i - j)        out_i = sum_j f(x_ij) v_j / N_i

    over the keys j that query i sees; query head h reads key/value head h // (H / G).

    | similarity | f(x) | normalize, and N_i by it |
    |---|---|---|
    | identity | x | none: 1; sum: sum_j f; clamped_sum: max(abs(sum_j f), 1) |
    | sigmoid | 1 / (1 + e^-x) | none: 1; sum: sum_j f |
    | elu | e^x below 0, x + 1 from there | none: 1; sum: sum_j f |
    | softpick | relu(e^x - 1) | sum: sum_j abs(e^x_ij - 1) + 1e-6 |

    A kernel of feature maps is identity on mapped queries and keys, with a scale of 1: made of
    positive features and divided by the sum it is linear attention's; clamped_sum is for scores of
    either sign. softpick (arXiv 2504.20966) is computed relative to the largest score.

    With g = f, or abs(e^x - 1) for softpick, the gradients of the scores are

        dx_ij = f'(x_ij) dout_i.v_j / N_i - g'(x_ij) c_i        c_i = dout_i.out_i N'_i / N_i

    N'_i = dN_i / dsum_j g: 0 (none), 1 (sum), or sign(sum_j f) where abs(sum_j f) > 1, else 0.

    row_abs_sum_BHT is sum_j abs(f(x_ij)), before N; for softpick, whose f may be no number of the
    dtype, it is sum_j f(x_ij) / N_i, so at most 1.

    Statistics are those of ``kernels.attention.statistics`` for P_ij = abs(f(x_ij)) /
    sum_j abs(f(x_ij)), which doesn't depend on N; null_mass is None. A sum below 1e-30 counts as 0,
    and what a sum of 0 divides is 0: out, P, gradients. Empty rows are of that kind, so

        sum_k key_mass = number of queries with sum_j abs(f) > 0      for each row and head.

    scale: factor of q.k; D**-0.5 if it is None. bias: added to every score.
    slopes_H: ALiBi, adds -slope (i - j) to the score.
    key_mass_tap_BHS: a leaf of zeros that requires a gradient; key mass is then its gradient after
        the backward pass, and ``statistics.key_mass_BHS`` is None.
    implementation: ``auto``, or one by name.

    Raises ``UserError`` for shapes, dtypes, a normalization that the similarity hasn't, or a forced
    implementation that can't run them.
    """
    level = level_of(statistics)
    similarity, normalize = _kind(similarity, normalize)
    check_tensors(q_BTHD, k_BTGD, v_BTGE, mask)
    check_slopes(slopes_H, q_BTHD)
    check_tap(key_mass_tap_BHS, q_BTHD, level)
    scale = checked_scale(scale, q_BTHD)
    bias = checked_number("bias", bias)
    arguments = {
        "similarity": similarity,
        "normalize": normalize,
        "scale": scale,
        "bias": bias,
        "slopes_H": slopes_H,
        "level": level,
    }
    if _choose(implementation, q_BTHD, v_BTGE, mask, slopes_H) == "triton":
        out_BTHE, row_abs_sum_BHT, measured = fused_similarity(
            q_BTHD, k_BTGD, v_BTGE, mask, tap_BHT=key_mass_tap_BHS, **arguments
        )
        return SimilarityOutput(out_BTHE, row_abs_sum_BHT, measured, None)
    # Autocast would take the reference's matrix products, made in fp32 or better, to bf16.
    with torch.autocast(q_BTHD.device.type, enabled=False):
        out_BTHE, row_abs_sum_BHT, measured, probabilities_BHTS = reference_similarity(
            q_BTHD, k_BTGD, v_BTGE, mask, **arguments
        )
    if key_mass_tap_BHS is not None:
        out_BTHE, row_abs_sum_BHT, measured = deliver_key_mass(
            out_BTHE, row_abs_sum_BHT, measured, key_mass_tap_BHS
        )
    return SimilarityOutput(out_BTHE, row_abs_sum_BHT.detach(), measured, probabilities_BHTS)


def _kind(similarity: Similarity | str, normalize: Normalize | str) -> tuple[Similarity, Normalize]:
    for setting, known, value in (
        ("similarity", _SIMILARITIES, similarity),
        ("normalize", _NORMALIZATIONS, normalize),
    ):
        allowed = f"must be one of {', '.join(known)}"
        require(value in known, f"attention.{setting}", allowed, value)
    allowed = ALLOWED[similarity]
    rule = f"must be {' or '.join(allowed)} for {_SIMILARITIES[similarity].value}"
    require(normalize in allowed, "attention.normalize", rule, _NORMALIZATIONS[normalize].value)
    return _SIMILARITIES[similarity], _NORMALIZATIONS[normalize]


def _choose(
    implementation: str,
    q_BTHD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    slopes_H: Tensor | None,
) -> str:
    """The one place that picks an implementation: the fastest that can, or the forced one."""
    require(
        implementation in IMPLEMENTATIONS,
        "attention.implementation",
        f"must be one of {', '.join(IMPLEMENTATIONS)}",
        implementation,
    )
    refusal = why_not_triton(q_BTHD, v_BTGE, mask, slopes_H)
    chosen = implementation
    if implementation == "triton" and refusal:
        raise UserError(f"attention.implementation triton can't run {refusal}; use reference")
    if implementation == "auto":
        # Triton's interpreter is for tests.
        chosen = "triton" if q_BTHD.device.type == "cuda" and not refusal else "reference"
    _log_once(chosen)
    return chosen


@torch.compiler.assume_constant_result
def _log_once(chosen: str) -> None:
    if chosen not in _logged_choices:
        _logged_choices.add(chosen)
        logger.info("similarity attention implementation: %s", chosen)
