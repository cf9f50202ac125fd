"""``sink_attention``: checks its inputs, picks an implementation, returns output and statistics.

Axes: B rows of the batch, T query positions, S key positions (S = T), H query heads, G key/value
heads (H is a multiple of G), D query/key head dim, E value head dim, R buckets.
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
    checked_scale,
    level_of,
    require_tensor,
    why_not_triton,
)
from kernels.attention.cpu import cpu_attention
from kernels.attention.reference import MAX_BIAS_DISTANCE, reference_attention
from kernels.attention.statistics import Statistics, StatisticsLevel, deliver_key_mass
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask

if HAS_TRITON:
    from kernels.attention.fused.op import fused_attention

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")

_logged_choices: set[str] = set()


class AttentionOutput(NamedTuple):
    """out_BTHE in q's dtype; lse_BHT, the log of the softmax denominator, null slot included, fp32
    (fp64 for fp64 inputs), -inf in an empty row; statistics, None at level ``off``; and
    probabilities_BHTS, the attention matrix without the null slot, ``reference`` only.
    """

    out_BTHE: Tensor
    lse_BHT: Tensor
    statistics: Statistics | None
    probabilities_BHTS: Tensor | None


def sink_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    *,
    scale: float | None = None,
    null_logit: Tensor | None = None,
    slopes_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
    statistics: StatisticsLevel | str = StatisticsLevel.basic,
    key_mass_tap_BHS: Tensor | None = None,
    implementation: str = "auto",
) -> AttentionOutput:
    """Softmax attention under ``mask``, with the statistics of ``kernels.attention.statistics``.

    Query head h reads key/value head h // (H / G). The formulas are those of
    ``kernels.attention.reference``; out and lse are differentiable:

        dS_ij = P_ij (dP_ij - delta_i + dlse_i)      dnull_i = P_null,i (dlse_i - delta_i)

    with delta_i = dout_i.out_i. A query that sees no key gives out 0, lse -inf, gradient 0 and
    statistics 0, with a null slot too.

    scale: factor of q.k; D**-0.5 if it is None.
    null_logit: [H] or [B, H, T]; adds exp(null_logit) to the softmax denominator.
    slopes_H: ALiBi, adds -slope (i - j) to the score. bias_HR: adds a relative bias by T5's
        unidirectional bucket of i - j, 2 to 128 buckets up to distance 128.
    key_mass_tap_BHS: a leaf of zeros that requires a gradient; key mass is then its gradient after
        the backward pass, which makes it on the way, and ``statistics.key_mass_BHS`` is None.
        Without a tap key mass takes a pass over q and k of its own.
    implementation: ``auto``, or one by name.

    Raises ``UserError`` for shapes, dtypes, devices, or a forced implementation that can't run.
    """
    level = level_of(statistics)
    check_tensors(q_BTHD, k_BTGD, v_BTGE, mask)
    _check_extras(q_BTHD, null_logit, slopes_H, bias_HR)
    check_tap(key_mass_tap_BHS, q_BTHD, level)
    scale = checked_scale(scale, q_BTHD)
    chosen = _choose(implementation, q_BTHD, v_BTGE, mask, scale, slopes_H, bias_HR)
    null_logit_BHT = null_logit
    if null_logit is not None and null_logit.ndim == 1:
        batch_size, num_tokens, num_heads, _ = q_BTHD.shape
        null_logit_BHT = null_logit[:, None].expand(batch_size, num_heads, num_tokens)

    if chosen == "triton":
        out_BTHE, lse_BHT, measured = fused_attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            mask,
            scale=scale,
            null_logit_BHT=null_logit_BHT,
            slopes_H=slopes_H,
            level=level,
            tap_BHT=key_mass_tap_BHS,
        )
        return AttentionOutput(out_BTHE, lse_BHT, measured, None)

    probabilities_BHTS = None
    if chosen == "cpu":
        out_BTHE, lse_BHT, measured = cpu_attention(
            q_BTHD, k_BTGD, v_BTGE, mask, scale=scale, null_logit_BHT=null_logit_BHT, level=level
        )
    else:
        # Autocast would take the reference's matrix products, made in fp32 or better, to bf16.
        with torch.autocast(q_BTHD.device.type, enabled=False):
            out_BTHE, lse_BHT, measured, probabilities_BHTS = reference_attention(
                q_BTHD,
                k_BTGD,
                v_BTGE,
                mask,
                scale=scale,
                null_logit_BHT=null_logit_BHT,
                slopes_H=slopes_H,
                bias_HR=bias_HR,
                level=level,
            )
    if key_mass_tap_BHS is not None:
        out_BTHE, lse_BHT, measured = deliver_key_mass(
            out_BTHE, lse_BHT, measured, key_mass_tap_BHS
        )
    return AttentionOutput(out_BTHE, lse_BHT, measured, probabilities_BHTS)


def _choose(
    implementation: str,
    q_BTHD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    scale: float,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
) -> str:
    """The one place that picks an implementation: the fastest that can, or the forced one."""
    require(
        implementation in IMPLEMENTATIONS,
        "attention.implementation",
        f"must be one of {', '.join(IMPLEMENTATIONS)}",
        implementation,
    )
    refusals = {
        "triton": _why_not_triton(q_BTHD, v_BTGE, mask, scale, slopes_H, bias_HR),
        "cpu": _why_not_cpu(q_BTHD, mask, slopes_H, bias_HR),
    }
    if refusals.get(implementation):
        raise UserError(
            f"attention.implementation {implementation} can't run {refusals[implementation]}; "
            "use reference"
        )
    chosen = implementation
    if implementation == "auto":
        fast = "cpu" if q_BTHD.device.type == "cpu" else "triton"
        chosen = "reference" if refusals[fast] else fast
    _log_once(chosen)
    return chosen


def _why_not_cpu(
    q_BTHD: Tensor, mask: IntervalMask | DenseMask, slopes_H: Tensor | None, bias_HR: Tensor | None
) -> str | None:
    if q_BTHD.device.type != "cpu":
        return f"tensors on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.float32, torch.float64):
        return f"{q_BTHD.dtype} (only float32 and float64)"
    if not isinstance(mask, IntervalMask):
        return "a dense mask"
    if slopes_H is not None or bias_HR is not None:
        return "slopes or a relative bias"
    return None


def _why_not_triton(
    q_BTHD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask | DenseMask,
    scale: float,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
) -> str | None:
    if bias_HR is not None:
        return "a relative bias"
    if scale <= 0:
        return f"a scale that isn't positive ({scale})"
    return why_not_triton(q_BTHD, v_BTGE, mask, slopes_H)


@torch.compiler.assume_constant_result
def _log_once(chosen: str) -> None:
    if chosen not in _logged_choices:
        _logged_choices.add(chosen)
        logger.info("attention implementation: %s", chosen)


def _check_extras(
    q_BTHD: Tensor, null_logit: Tensor | None, slopes_H: Tensor | None, bias_HR: Tensor | None
) -> None:
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    check_slopes(slopes_H, q_BTHD)
    if null_logit is not None:
        require_tensor("null_logit", null_logit, q_BTHD)
        shapes = [(num_heads,), (batch_size, num_heads, num_tokens)]
        require(
            tuple(null_logit.shape) in shapes,
            "attention.null_logit",
            f"must have shape {shapes[0]} or {shapes[1]}",
            tuple(null_logit.shape),
        )
    if bias_HR is not None:
        require_tensor("bias", bias_HR, q_BTHD)
        require(
            bias_HR.ndim == 2
            and bias_HR.shape[0] == num_heads
            and 2 <= bias_HR.shape[1] <= MAX_BIAS_DISTANCE,
            "attention.bias",
            f"must have shape ({num_heads}, 2 to {MAX_BIAS_DISTANCE})",
            tuple(bias_HR.shape),
        )
