"""One call of attention, forward or backward: which tile and which program each kernel takes.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.fused import portable
from kernels.attention.fused.blocks import LOG2_E
from kernels.attention.fused.hopper import launch as hopper
from kernels.attention.fused.tensors import (
    BackwardCall,
    BackwardOutputs,
    ForwardOutputs,
    MaskTensors,
)
from kernels.attention.fused.tiles import Situation, Tile, Warpgroups, tile_for

PADDING = 64
"""Rows of log_sum and shift come in multiples of this, so that bulk copies may read past T."""


def forward(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: MaskTensors,
    null_logit_BHT: Tensor | None,
    slopes_H: Tensor | None,
    scale: float,
    level: str,
    outputs: ForwardOutputs,
) -> None:
    """Fill ``outputs``; those that the level doesn't ask for have no elements."""
    tile = _tile("forward", q_BTHD, v_BTGE, mask, slopes_H, level)
    if isinstance(tile, Warpgroups):
        hopper.forward(q_BTHD, k_BTGD, v_BTGE, mask, null_logit_BHT, scale, level, outputs, tile)
    else:
        portable.forward(
            q_BTHD, k_BTGD, v_BTGE, mask, null_logit_BHT, slopes_H, scale, level, outputs, tile
        )


def backward(call: BackwardCall, grads: BackwardOutputs) -> None:
    """Fill ``grads``: dq, dk, dv, shift and, unless level is off, key mass."""
    batch_size, num_tokens, num_heads, _ = call.q_BTHD.shape
    num_rows = (num_tokens + PADDING - 1) // PADDING * PADDING
    log_sum_BHt = call.lse_BHT.new_empty((batch_size, num_heads, num_rows))
    shift_BHt = grads.shift_BHT
    if num_rows > num_tokens:
        shift_BHt = torch.empty_like(log_sum_BHt)
    query_gradients(call, grads, log_sum_BHt, shift_BHt)
    key_gradients(call, grads, log_sum_BHt, shift_BHt)
    if num_rows > num_tokens:
        grads.shift_BHT.copy_(shift_BHt[..., :num_tokens])


def query_gradients(
    call: BackwardCall, grads: BackwardOutputs, log_sum_BHt: Tensor, shift_BHt: Tensor
) -> None:
    """Fill dq of ``grads``, log_sum and shift: the backward pass's first half."""
    # It measures nothing, so it is the same at every level.
    tile = _tile("query", call.q_BTHD, call.v_BTGE, call.mask, call.slopes_H, "off")
    program = hopper if isinstance(tile, Warpgroups) else portable
    program.query_gradients(call, grads, log_sum_BHt, shift_BHt, tile)


def key_gradients(
    call: BackwardCall, grads: BackwardOutputs, log_sum_BHt: Tensor, shift_BHt: Tensor
) -> None:
    """Fill dk, dv and key mass of ``grads``: the backward pass's second half."""
    level = "basic" if call.measures else "off"
    tile = _tile("key", call.q_BTHD, call.v_BTGE, call.mask, call.slopes_H, level)
    program = hopper if isinstance(tile, Warpgroups) else portable
    program.key_gradients(call, grads, log_sum_BHt, shift_BHt, tile)


def key_mass(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    lse_BHT: Tensor,
    mask: MaskTensors,
    slopes_H: Tensor | None,
    scale: float,
    key_mass_BHT: Tensor,
) -> None:
    """Fill ``key_mass_BHT`` from lse, where there is no backward pass."""
    log_sum_BHT = torch.where(lse_BHT == -torch.inf, torch.inf, lse_BHT * LOG2_E.value)
    tile = _tile("key_mass", q_BTHD, q_BTHD, mask, slopes_H, "basic")
    portable.key_mass(q_BTHD, k_BTGD, log_sum_BHT, mask, slopes_H, scale, key_mass_BHT, tile)


def _tile(
    kernel: str,
    q_BTHD: Tensor,
    v_BTGE: Tensor,
    mask: MaskTensors,
    slopes_H: Tensor | None,
    level: str,
) -> Tile | Warpgroups:
    situation = Situation(
        device=q_BTHD.device,
        dtype=q_BTHD.dtype,
        head_dim=max(q_BTHD.shape[3], v_BTGE.shape[3]),
        num_tokens=q_BTHD.shape[1],
        is_causal=mask.is_causal,
        level=level,
    )
    return tile_for(kernel, situation, hopper.can_run(q_BTHD, v_BTGE, mask, slopes_H))
