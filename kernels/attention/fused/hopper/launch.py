"""Launches of Hopper's kernels.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D head dim
of queries, keys and values.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.fused.hopper.forward import forward_kernel
from kernels.attention.fused.hopper.key import key_kernel
from kernels.attention.fused.hopper.pieces import ROWS
from kernels.attention.fused.hopper.query import query_kernel
from kernels.attention.fused.tables import bounds, plan
from kernels.attention.fused.tensors import (
    BackwardCall,
    BackwardOutputs,
    ForwardOutputs,
    MaskTensors,
    parts,
    parts_of,
)
from kernels.attention.fused.tiles import Warpgroups

HEAD_DIMS = (64, 96, 128)
_GROUP_ROWS = ROWS.value


def can_run(q_BTHD: Tensor, v_BTGE: Tensor, mask: MaskTensors, slopes_H: Tensor | None) -> bool:
    """Whether they can: a Hopper card, 16 bits, one head dim of ``HEAD_DIMS``, no slopes."""
    return (
        q_BTHD.device.type == "cuda"
        and torch.cuda.get_device_capability(q_BTHD.device) == (9, 0)
        and q_BTHD.element_size() == 2
        and q_BTHD.shape[3] == v_BTGE.shape[3]
        and q_BTHD.shape[3] in HEAD_DIMS
        and slopes_H is None
        # start and stop come in bulk copies too, whose steps are 16 bytes.
        and (mask.is_causal or q_BTHD.shape[1] % 4 == 0)
    )


def forward(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    mask: MaskTensors,
    null_logit_BHT: Tensor | None,
    scale: float,
    level: str,
    outputs: ForwardOutputs,
    tile: Warpgroups,
) -> None:
    """Fill ``outputs``."""
    batch_size, num_tokens, num_heads, head_dim = q_BTHD.shape
    null_strides = (0, 0, 0) if null_logit_BHT is None else null_logit_BHT.stride()
    measures = level != "off"
    num_blocks = triton.cdiv(num_tokens, _GROUP_ROWS * tile.groups)
    # The largest score of each of M tiles.
    top_BHM = outputs.lse_BHT.new_empty((batch_size, num_heads, num_blocks * tile.groups))
    first, second = parts_of(head_dim)
    forward_kernel[(num_blocks, batch_size * num_heads)](
        *_parts(q_BTHD, _GROUP_ROWS), *_parts(k_BTGD, tile.rows), *_parts(v_BTGD, tile.rows),
        *_parts(outputs.out_BTHE, _GROUP_ROWS),
        mask.start_BT, mask.stop_BT, mask.document_start_BT,
        bounds(mask, _GROUP_ROWS, documents=measures),
        null_logit_BHT, *null_strides,
        outputs.lse_BHT, outputs.first_BHT, outputs.document_BHT, outputs.null_BHT,
        outputs.entropy_BHT, top_BHM,
        num_tokens, num_heads, num_heads // k_BTGD.shape[2], scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, HAS_NULL=null_logit_BHT is not None,
        MEASURE=measures, ENTROPY=level == "full", ONE_DOCUMENT=mask.one_document,
        D0=first, D1=second,
        BN=tile.rows, STAGES=tile.stages, GROUPS=tile.groups, REGISTERS=tile.registers,
        **tile.launch_options,
    )  # fmt: skip
    if measures:
        torch.amax(top_BHM, -1, out=outputs.max_BH)


def query_gradients(
    call: BackwardCall,
    grads: BackwardOutputs,
    log_sum_BHt: Tensor,
    shift_BHt: Tensor,
    tile: Warpgroups,
) -> None:
    """Fill dq of ``grads``, and log_sum and shift, which may hold more rows than T."""
    q_BTHD, k_BTGD, v_BTGD, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, head_dim = q_BTHD.shape
    first, second = parts_of(head_dim)
    num_blocks = triton.cdiv(num_tokens, _GROUP_ROWS * tile.groups)
    query_kernel[(num_blocks, batch_size * num_heads)](
        *_parts(q_BTHD, _GROUP_ROWS), *_parts(k_BTGD, tile.rows), *_parts(v_BTGD, tile.rows),
        *_parts(call.out_BTHE, _GROUP_ROWS), *_parts(call.dout_BTHE, _GROUP_ROWS),
        *_parts(grads.dq_BTHD, _GROUP_ROWS),
        mask.start_BT, mask.stop_BT, bounds(mask, _GROUP_ROWS),
        call.lse_BHT, call.dlse_BHT, log_sum_BHt, shift_BHt,
        num_tokens, log_sum_BHt.shape[2], num_heads, num_heads // k_BTGD.shape[2], call.scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, HAS_DLSE=call.dlse_BHT is not None,
        D0=first, D1=second,
        BN=tile.rows, STAGES=tile.stages, GROUPS=tile.groups, OVERLAP=tile.overlap,
        REGISTERS=tile.registers, **tile.launch_options,
    )  # fmt: skip


def key_gradients(
    call: BackwardCall,
    grads: BackwardOutputs,
    log_sum_BHt: Tensor,
    shift_BHt: Tensor,
    tile: Warpgroups,
) -> None:
    """Fill dk, dv and, if the call measures, key mass of ``grads``."""
    # Past its last row a bulk copy reads zeros, which would be a log sum.
    assert log_sum_BHt.shape[2] % tile.rows == 0
    q_BTHD, k_BTGD, v_BTGD, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, head_dim = q_BTHD.shape
    num_groups = k_BTGD.shape[2]
    keys = _GROUP_ROWS * tile.groups
    first, second = parts_of(head_dim)
    start = stop = None
    if not mask.is_causal:
        start, stop = _rows(mask.start_BT, tile.rows), _rows(mask.stop_BT, tile.rows)
    key_kernel[(triton.cdiv(num_tokens, keys), batch_size * num_groups)](
        *_parts(q_BTHD, tile.rows), *_parts(k_BTGD, _GROUP_ROWS), *_parts(v_BTGD, _GROUP_ROWS),
        *_parts(call.dout_BTHE, tile.rows), *_parts(grads.dk_BTGD, _GROUP_ROWS),
        *_parts(grads.dv_BTGE, _GROUP_ROWS),
        _rows(log_sum_BHt.flatten(0, 1), tile.rows), _rows(shift_BHt.flatten(0, 1), tile.rows),
        start, stop, plan(mask, tile.rows, keys),
        grads.key_mass_BHT, num_tokens, num_groups, num_heads // num_groups, call.scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, MEASURE=call.measures,
        D0=first, D1=second,
        BM=tile.rows, STAGES=tile.stages, GROUPS=tile.groups, OVERLAP=tile.overlap,
        REGISTERS=tile.registers, **tile.launch_options,
    )  # fmt: skip


def _parts(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    return parts(x, rows, _descriptor)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], tile: list[int]):
    # A swizzle as wide as a row of the tile keeps the products free of bank conflicts.
    layout = gl.NVMMASharedLayout(min(tile[3] * x.element_size(), 128), 16, 4)
    return TensorDescriptor(x, shape, strides, tile, layout)


def _rows(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of [rows of the batch, T] fp32 or int32 that gives ``rows`` values of a row."""
    layout = gl.NVMMASharedLayout(0, 32, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows], layout)
