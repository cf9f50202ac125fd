"""``swiglu`` and its gradient by Triton: what is read is read once, what is written written once.

Axes: N tokens (R of a program), F inner width (f of a program), P = 2 F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 4, 512
"""What a program computes."""


@triton.jit
def _tile(num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's places: rows as a column of int64, columns as a row, and which of them exist."""
    row_R1 = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column_1f = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row_R1, column_1f, (row_R1 < num_rows) & (column_1f < width)


@triton.jit
def forward_kernel(x_NP, y_NF, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (rows, columns) in tiles. y = silu(gate) up."""
    row, column, exists = _tile(num_rows, width, ROWS, COLUMNS)
    x_Rf = x_NP + row * (2 * width) + column
    gate = tl.load(x_Rf, exists, other=0.0).to(tl.float32)
    up = tl.load(x_Rf + width, exists, other=0.0).to(tl.float32)
    tl.store(y_NF + row * width + column, gate * tl.sigmoid(gate) * up, exists)


@triton.jit
def backward_kernel(dy_NF, x_NP, dx_NP, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (rows, columns) in tiles. dup = dy silu(gate), dgate = dy up silu'(gate)."""
    row, column, exists = _tile(num_rows, width, ROWS, COLUMNS)
    at = row * (2 * width) + column
    gate = tl.load(x_NP + at, exists, other=0.0).to(tl.float32)
    up = tl.load(x_NP + at + width, exists, other=0.0).to(tl.float32)
    dy = tl.load(dy_NF + row * width + column, exists, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dx_NP + at, dy * up * share * (1.0 + gate * (1.0 - share)), exists)
    tl.store(dx_NP + at + width, dy * gate * share, exists)


def _launch(kernel, *tensors: Tensor, num_rows: int, width: int) -> None:
    # Triton launches on the current device, which need not be the tensors'; and never nothing.
    if num_rows and width:
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, num_rows, width, ROWS=ROWS, COLUMNS=COLUMNS)


@torch.library.custom_op("sinklab::swiglu", mutates_args=())
def fused_swiglu(x_NP: Tensor) -> Tensor:
    """``swiglu`` by Triton, of any number of leading axes."""
    x_NP = x_NP.contiguous()
    y_NF = _half(x_NP)
    width = y_NF.shape[-1]
    _launch(forward_kernel, x_NP, y_NF, num_rows=y_NF.shape[:-1].numel(), width=width)
    return y_NF


@fused_swiglu.register_fake
def _half(x_NP):
    return x_NP.new_empty(*x_NP.shape[:-1], x_NP.shape[-1] // 2)


@torch.library.custom_op("sinklab::swiglu_backward", mutates_args=())
def _backward(dy_NF: Tensor, x_NP: Tensor) -> Tensor:
    dy_NF, x_NP = dy_NF.contiguous(), x_NP.contiguous()
    dx_NP = _like(dy_NF, x_NP)
    width = dy_NF.shape[-1]
    rows = dy_NF.shape[:-1].numel()
    _launch(backward_kernel, dy_NF, x_NP, dx_NP, num_rows=rows, width=width)
    return dx_NP


@_backward.register_fake
def _like(dy_NF, x_NP):
    return torch.empty_like(x_NP, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@once_differentiable
def _differentiate(ctx, dy_NF):
    return _backward(dy_NF, *ctx.saved_tensors)


fused_swiglu.register_autograd(_differentiate, setup_context=_setup_context)
