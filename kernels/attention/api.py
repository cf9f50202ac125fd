"""``sink_attention``: checks its inputs, picks an implementation, returns output and statistics.

Axes: B rows of the batch, T query positions, S key positions (S = T), H query heads, G key/value
heads (H is a multiple of G), D query/key head dim, E value head dim, R buckets.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.cpu import cpu_attention
from kernels.attention.reference import MAX_BIAS_DISTANCE, reference_attention
from kernels.attention.statistics import Statistics, StatisticsLevel, deliver_key_mass
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when it is imported whether kernels run in its interpreter, on a CPU.
_INTERPRETED = False
if _HAS_TRITON:
    from triton import knobs

    from kernels.attention.fused.op import fused_attention

    _INTERPRETED = knobs.runtime.interpret

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")

MAX_HEAD_DIM = 256
"""Largest head dim of the Triton kernels: their tiles must fit in shared memory."""

MAX_PROGRAMS = 2**16 - 1
"""Rows x heads that the Triton kernels take: CUDA's limit on a grid's second axis."""

# Read once: compiled code can't iterate over an enumeration in every supported PyTorch.
_LEVELS = {level.value: level for level in StatisticsLevel}
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
    level = _level(statistics)
    _check_tensors(q_BTHD, k_BTGD, v_BTGE, mask)
    _check_extras(q_BTHD, null_logit, slopes_H, bias_HR, key_mass_tap_BHS, level)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    is_number = isinstance(scale, int | float) and math.isfinite(scale)
    require(is_number, "attention.scale", "must be a finite number", scale)
    scale = float(scale)
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
    if not _HAS_TRITON:
        return "without the package triton"
    if q_BTHD.device.type != "cuda" and not _INTERPRETED:
        return f"tensors on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q_BTHD.dtype}"
    if _INTERPRETED and q_BTHD.dtype == torch.bfloat16:
        return "torch.bfloat16 in Triton's interpreter, which computes it wrongly"
    if not isinstance(mask, IntervalMask):
        return "a dense mask"
    if bias_HR is not None:
        return "a relative bias"
    if slopes_H is not None and slopes_H.requires_grad:
        return "slopes that need a gradient"
    if scale <= 0:
        return f"a scale that isn't positive ({scale})"
    programs = q_BTHD.shape[0] * q_BTHD.shape[2]
    if programs > MAX_PROGRAMS:
        return f"{programs} rows x heads (at most {MAX_PROGRAMS})"
    step = 16 // q_BTHD.element_size()
    for head_dim in (q_BTHD.shape[3], v_BTGE.shape[3]):
        if head_dim % step or head_dim > MAX_HEAD_DIM:
            return f"head dim {head_dim} (only multiples of {step} up to {MAX_HEAD_DIM})"
    return None


@torch.compiler.assume_constant_result
def _log_once(chosen: str) -> None:
    if chosen not in _logged_choices:
        _logged_choices.add(chosen)
        logger.info("attention implementation: %s", chosen)


def _level(statistics: StatisticsLevel | str) -> StatisticsLevel:
    if isinstance(statistics, StatisticsLevel):
        return statistics
    allowed = f"must be one of {', '.join(_LEVELS)}"
    require(
        isinstance(statistics, str) and statistics in _LEVELS, "statistics", allowed, statistics
    )
    return _LEVELS[statistics]


def _check_tensors(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, mask: IntervalMask | DenseMask
) -> None:
    for name, tensor in (("q", q_BTHD), ("k", k_BTGD), ("v", v_BTGE)):
        setting = f"attention.{name}"
        _require_tensor(name, tensor, q_BTHD)
        require(tensor.ndim == 4, setting, "must be [B, T, heads, D]", tuple(tensor.shape))
        require(tensor.is_floating_point(), setting, "must be floating point", tensor.dtype)
        require(tensor.dtype == q_BTHD.dtype, setting, f"must be {q_BTHD.dtype}", tensor.dtype)
    is_mask = isinstance(mask, IntervalMask | DenseMask)
    require(is_mask, "attention.mask", "must be an IntervalMask or a DenseMask", type(mask))
    _require_tensor("mask", mask.document_start_BT, q_BTHD)
    batch_size, num_tokens, num_heads, head_dim = q_BTHD.shape
    require(head_dim >= 1, "attention.q", "must have a head dim", tuple(q_BTHD.shape))
    num_groups = k_BTGD.shape[2]
    _require_shape("k", k_BTGD, (batch_size, num_tokens, num_groups, head_dim))
    _require_shape("v", v_BTGE, (batch_size, num_tokens, num_groups, v_BTGE.shape[3]))
    require(
        num_groups >= 1 and num_heads % num_groups == 0,
        "attention.k",
        f"must have a number of heads that divides q's {num_heads}",
        num_groups,
    )
    require(
        tuple(mask.document_start_BT.shape) == (batch_size, num_tokens),
        "attention.mask",
        f"must be of {batch_size} rows of {num_tokens} tokens, as q [B, T, H, D] is",
        tuple(mask.document_start_BT.shape),
    )


def _check_extras(
    q_BTHD: Tensor,
    null_logit: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    tap_BHS: Tensor | None,
    level: StatisticsLevel,
) -> None:
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    extras = (("null_logit", null_logit), ("slopes", slopes_H), ("bias", bias_HR))
    for name, tensor in (*extras, ("key_mass_tap", tap_BHS)):
        if tensor is not None:
            _require_tensor(name, tensor, q_BTHD)
            is_float = tensor.is_floating_point()
            require(is_float, f"attention.{name}", "must be floating point", tensor.dtype)
    if null_logit is not None:
        shapes = [(num_heads,), (batch_size, num_heads, num_tokens)]
        require(
            tuple(null_logit.shape) in shapes,
            "attention.null_logit",
            f"must have shape {shapes[0]} or {shapes[1]}",
            tuple(null_logit.shape),
        )
    if slopes_H is not None:
        _require_shape("slopes", slopes_H, (num_heads,))
    if bias_HR is not None:
        require(
            bias_HR.ndim == 2
            and bias_HR.shape[0] == num_heads
            and 2 <= bias_HR.shape[1] <= MAX_BIAS_DISTANCE,
            "attention.bias",
            f"must have shape ({num_heads}, 2 to {MAX_BIAS_DISTANCE})",
            tuple(bias_HR.shape),
        )
    if tap_BHS is not None:
        _require_shape("key_mass_tap", tap_BHS, (batch_size, num_heads, num_tokens))
        requires = tap_BHS.requires_grad
        require(requires, "attention.key_mass_tap", "must require a gradient", requires)
        require(
            level is not StatisticsLevel.off,
            "statistics",
            "must be basic or full where a key mass tap is passed",
            level.value,
        )


def _require_tensor(name: str, tensor: object, q_BTHD: Tensor) -> None:
    is_tensor = isinstance(tensor, Tensor)
    require(is_tensor, f"attention.{name}", "must be a tensor", type(tensor).__name__)
    device = q_BTHD.device
    require(
        tensor.device == device, f"attention.{name}", f"must be on {device} as q is", tensor.device
    )


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    require(
        tuple(tensor.shape) == shape,
        f"attention.{name}",
        f"must have shape {shape}",
        tuple(tensor.shape),
    )
