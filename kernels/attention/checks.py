"""What both attentions ask of their arguments, and where Triton kernels can run.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.attention.statistics import StatisticsLevel
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = False
"""Triton decides when it is imported whether kernels run in its interpreter, on a CPU."""
if HAS_TRITON:
    from triton import knobs

    INTERPRETED = knobs.runtime.interpret

_LARGEST = torch.finfo(torch.float32).max

MAX_HEAD_DIM = 256
"""Largest head dim of the Triton kernels: their tiles must fit in shared memory."""

MAX_PROGRAMS = 2**16 - 1
"""Rows x heads that the Triton kernels take: CUDA's limit on a grid's second axis."""

TENSOR_IMPLEMENTATIONS = ("auto", "triton", "reference")
"""Of the functions of one tensor: the loss and the gate."""

# Read once: compiled code can't iterate over an enumeration in every supported PyTorch.
_LEVELS = {level.value: level for level in StatisticsLevel}


def why_not_triton(
    q_BTHD: Tensor, v_BTGE: Tensor, mask: IntervalMask | DenseMask, slopes_H: Tensor | None
) -> str | None:
    """Why the Triton kernels can't run this, or None if they can."""
    if not HAS_TRITON:
        return "without the package triton"
    if q_BTHD.device.type != "cuda" and not INTERPRETED:
        return f"tensors on {q_BTHD.device.type}"
    if q_BTHD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q_BTHD.dtype}"
    if INTERPRETED and q_BTHD.dtype == torch.bfloat16:
        return "torch.bfloat16 in Triton's interpreter, which computes it wrongly"
    if not isinstance(mask, IntervalMask):
        return "a dense mask"
    if slopes_H is not None and slopes_H.requires_grad:
        return "slopes that need a gradient"
    programs = q_BTHD.shape[0] * q_BTHD.shape[2]
    if programs > MAX_PROGRAMS:
        return f"{programs} rows x heads (at most {MAX_PROGRAMS})"
    step = 16 // q_BTHD.element_size()
    for head_dim in (q_BTHD.shape[3], v_BTGE.shape[3]):
        if head_dim % step or head_dim > MAX_HEAD_DIM:
            return f"head dim {head_dim} (only multiples of {step} up to {MAX_HEAD_DIM})"
    return None


def takes_triton(implementation: str, x: Tensor) -> bool:
    """Whether the Triton kernels of a function of one tensor are to compute it: where they are
    asked for by name, and by ``auto`` on GPUs.

    Raises ``UserError`` for an implementation that doesn't exist or can't run.
    """
    known = implementation in TENSOR_IMPLEMENTATIONS
    allowed = f"must be one of {', '.join(TENSOR_IMPLEMENTATIONS)}"
    require(known, "implementation", allowed, implementation)
    refusal = _why_not_triton_on(x)
    if implementation == "triton" and refusal:
        raise UserError(f"implementation triton can't run {refusal}; use reference")
    is_asked = implementation == "triton" or (implementation == "auto" and x.is_cuda)
    return is_asked and refusal is None


def _why_not_triton_on(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "without the package triton"
    if not x.is_cuda and not INTERPRETED:
        return f"tensors on {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype}"
    if INTERPRETED and x.dtype != torch.float32:
        # CPUs have no product that sums 16 bits in fp32, and the interpreter gets bf16 wrong.
        return f"{x.dtype} in Triton's interpreter"
    return None


def level_of(statistics: StatisticsLevel | str) -> StatisticsLevel:
    """The level by its name."""
    if isinstance(statistics, StatisticsLevel):
        return statistics
    allowed = f"must be one of {', '.join(_LEVELS)}"
    require(
        isinstance(statistics, str) and statistics in _LEVELS, "statistics", allowed, statistics
    )
    return _LEVELS[statistics]


def check_tensors(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, mask: IntervalMask | DenseMask
) -> None:
    """Raise ``UserError`` unless axes, dtypes, devices and shapes fit together."""
    for name, tensor in (("q", q_BTHD), ("k", k_BTGD), ("v", v_BTGE)):
        setting = f"attention.{name}"
        require_tensor(name, tensor, q_BTHD)
        require(tensor.ndim == 4, setting, "must be [B, T, heads, D]", tuple(tensor.shape))
        require(tensor.dtype == q_BTHD.dtype, setting, f"must be {q_BTHD.dtype}", tensor.dtype)
    is_mask = isinstance(mask, IntervalMask | DenseMask)
    require(is_mask, "attention.mask", "must be an IntervalMask or a DenseMask", type(mask))
    require_tensor("mask", mask.document_start_BT, q_BTHD)
    batch_size, num_tokens, num_heads, head_dim = q_BTHD.shape
    require(head_dim >= 1, "attention.q", "must have a head dim", tuple(q_BTHD.shape))
    num_groups = k_BTGD.shape[2]
    require_shape("k", k_BTGD, (batch_size, num_tokens, num_groups, head_dim))
    require_shape("v", v_BTGE, (batch_size, num_tokens, num_groups, v_BTGE.shape[3]))
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


def check_slopes(slopes_H: Tensor | None, q_BTHD: Tensor) -> None:
    """Raise ``UserError`` unless there is a slope for each head."""
    if slopes_H is not None:
        require_tensor("slopes", slopes_H, q_BTHD)
        require_shape("slopes", slopes_H, (q_BTHD.shape[2],))


def check_tap(tap_BHS: Tensor | None, q_BTHD: Tensor, level: StatisticsLevel) -> None:
    """Raise ``UserError`` unless the tap fits the queries and can take a gradient."""
    if tap_BHS is None:
        return
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    require_tensor("key_mass_tap", tap_BHS, q_BTHD)
    require_shape("key_mass_tap", tap_BHS, (batch_size, num_heads, num_tokens))
    requires = tap_BHS.requires_grad
    require(requires, "attention.key_mass_tap", "must require a gradient", requires)
    require(
        level is not StatisticsLevel.off,
        "statistics",
        "must be basic or full where a key mass tap is passed",
        level.value,
    )


def checked_scale(scale: float | None, q_BTHD: Tensor) -> float:
    """``scale``, or D**-0.5 if it is None; raises ``UserError`` unless it is a finite number."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    return checked_number("scale", scale)


def checked_number(name: str, value: float) -> float:
    """``value``; raises ``UserError`` unless it is a finite number of fp32."""
    # Not math.isfinite, into which the compiler can't look where it takes floats as variables.
    is_number = isinstance(value, int | float) and abs(value) <= _LARGEST
    require(is_number, f"attention.{name}", "must be a finite number of fp32", value)
    return float(value)


def require_tensor(name: str, tensor: object, q_BTHD: Tensor) -> None:
    """Raise ``UserError`` unless it is a tensor where q is and (but for masks) of floats."""
    is_tensor = isinstance(tensor, Tensor)
    require(is_tensor, f"attention.{name}", "must be a tensor", type(tensor).__name__)
    device = q_BTHD.device
    require(
        tensor.device == device, f"attention.{name}", f"must be on {device} as q is", tensor.device
    )
    is_float = tensor.is_floating_point() or name == "mask"
    require(is_float, f"attention.{name}", "must be floating point", tensor.dtype)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless the tensor has that shape."""
    require(
        tuple(tensor.shape) == shape,
        f"attention.{name}",
        f"must have shape {shape}",
        tuple(tensor.shape),
    )
