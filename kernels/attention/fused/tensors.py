"""Tensors as the kernels take them: masks, outputs, descriptors of head dims in parts.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MIN_PART = 16
"""Narrowest tile the matrix units take."""


@dataclass(frozen=True, eq=False)
class MaskTensors:
    """An ``IntervalMask`` as one call of the kernels takes it: start, stop, document start [B, T].

    The kernels and their bulk copies read rows end to end, 16 bytes a step: other tensors are
    copied. bounds: tables that the call's kernels share, by queries a tile.
    """

    start_BT: Tensor
    stop_BT: Tensor
    document_start_BT: Tensor
    pinned: int
    is_causal: bool
    one_document: bool
    bounds: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in ("start_BT", "stop_BT", "document_start_BT"):
            object.__setattr__(self, name, _rows_end_to_end(getattr(self, name)))


class ForwardOutputs(NamedTuple):
    """What the forward fills; a statistic that the level doesn't ask for has no elements, nor has
    document mass where rows have one document, which makes it first mass.
    """

    out_BTHE: Tensor
    lse_BHT: Tensor
    first_BHT: Tensor
    document_BHT: Tensor
    null_BHT: Tensor
    max_BH: Tensor
    entropy_BHT: Tensor


class BackwardCall(NamedTuple):
    """What the backward pass gets; dlse is None where nobody asked for lse's gradient."""

    dout_BTHE: Tensor
    dlse_BHT: Tensor | None
    q_BTHD: Tensor
    k_BTGD: Tensor
    v_BTGE: Tensor
    out_BTHE: Tensor
    lse_BHT: Tensor
    mask: MaskTensors
    slopes_H: Tensor | None
    scale: float
    measures: bool


class BackwardOutputs(NamedTuple):
    """What the backward fills; shift = dout.out - dlse, fp32; no key mass has no elements."""

    dq_BTHD: Tensor
    dk_BTGD: Tensor
    dv_BTGE: Tensor
    shift_BHT: Tensor
    key_mass_BHT: Tensor


def parts_of(width: int) -> tuple[int, int]:
    """A head dim as two powers of two that cover it; the second is 0 if one is as good.

    96 = 64 + 32, 80 = 64 + 16, 160 = 128 + 32; 112 takes 128.
    """
    whole = max(triton.next_power_of_2(width), MIN_PART)
    first = whole // 2
    second = max(triton.next_power_of_2(width - first), MIN_PART)
    if first < MIN_PART or second >= first:
        return whole, 0
    return first, second


def second_part(x: Tensor) -> int:
    """Width of the second part of a tensor's last axis, or a placeholder's."""
    return parts_of(x.shape[3])[1] or MIN_PART


def parts(
    x: Tensor, rows: int, descriptor: Callable = TensorDescriptor
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of [B, T, heads, width] that give tiles of ``rows`` tokens of one head.

    descriptor: (tensor, shape, strides, tile shape) -> descriptor.
    """
    first, second = parts_of(x.shape[3])
    shape = list(x.shape)
    # An axis of one element may carry any stride, which the hardware would still check.
    strides = [
        step if size > 1 else x.shape[3] for step, size in zip(x.stride(), shape, strict=True)
    ]
    strides[3] = 1
    part0 = descriptor(x, shape, strides, [1, rows, 1, first])
    if not second:
        return part0, None
    # A view moves the base: the second part then starts at 0, and its end is the tensor's.
    rest = x[..., first:]
    return part0, descriptor(rest, list(rest.shape), strides, [1, rows, 1, second])


def precision_of(x: Tensor) -> str:
    """Triton's name for how products of ``x`` are made."""
    # fp32 is for tests: its products must not fall to tf32. Narrower inputs have one precision.
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _rows_end_to_end(x_BT: Tensor) -> Tensor:
    fine = x_BT.stride() == (x_BT.shape[1], 1) and x_BT.data_ptr() % 16 == 0
    # ``contiguous`` would keep a single row, whatever its stride and base.
    return x_BT if fine else x_BT.clone(memory_format=torch.contiguous_format)


def as_loadable(x: Tensor) -> Tensor:
    """``x`` itself where the hardware's tile copies can read it, else a contiguous copy.

    They need a last axis without gaps and 16-byte steps along the others. What the projections
    leave is fine; a gradient that was expanded from a scalar is not.
    """
    item = x.element_size()
    sizes = zip(x.shape[:3], x.stride()[:3], strict=True)
    fine = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    fine = fine and all(size == 1 or (step > 0 and step * item % 16 == 0) for size, step in sizes)
    return x if fine else x.clone(memory_format=torch.contiguous_format)
