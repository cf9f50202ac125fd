"""Launches of the portable Triton kernels, which run on any card and in the interpreter.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.attention.fused.backward import key_kernel, query_kernel
from kernels.attention.fused.forward import forward_kernel
from kernels.attention.fused.tables import bounds, plan
from kernels.attention.fused.tensors import (
    MIN_PART,
    BackwardCall,
    BackwardOutputs,
    ForwardOutputs,
    MaskTensors,
    parts,
    parts_of,
    precision_of,
    second_part,
)
from kernels.attention.fused.tiles import Tile


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
    tile: Tile,
) -> None:
    """Fill ``outputs``."""
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    null_strides = (0, 0, 0) if null_logit_BHT is None else null_logit_BHT.stride()
    num_tiles = triton.cdiv(num_tokens, tile.queries)
    # The largest score of each of M tiles.
    top_BHM = outputs.lse_BHT.new_empty((batch_size, num_heads, num_tiles))
    forward_kernel[(num_tiles, batch_size * num_heads)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(outputs.out_BTHE, tile.queries),
        k_BTGD, *k_BTGD.stride()[:3],
        mask.start_BT, mask.stop_BT, mask.document_start_BT,
        bounds(mask, tile.queries, documents=level != "off"),
        null_logit_BHT, *null_strides,
        slopes_H,
        outputs.lse_BHT, outputs.first_BHT, outputs.document_BHT, outputs.null_BHT,
        outputs.entropy_BHT, top_BHM,
        num_tokens, num_heads, num_heads // k_BTGD.shape[2], scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0,
        HAS_NULL=null_logit_BHT is not None, HAS_SLOPES=slopes_H is not None,
        MEASURE=level != "off", ENTROPY=level == "full", ONE_DOCUMENT=mask.one_document,
        HEAD_DIM=q_BTHD.shape[3], E0=parts_of(v_BTGE.shape[3])[0], E1=second_part(v_BTGE),
        BM=tile.queries, BN=tile.keys, PRECISION=precision_of(q_BTHD),
        **tile.launch_options,
    )  # fmt: skip
    if level != "off":
        torch.amax(top_BHM, -1, out=outputs.max_BH)


def query_gradients(
    call: BackwardCall,
    grads: BackwardOutputs,
    log_sum_BHt: Tensor,
    shift_BHt: Tensor,
    tile: Tile,
) -> None:
    """Fill dq of ``grads``, and log_sum and shift, which may hold more rows than T."""
    q_BTHD, k_BTGD, v_BTGE, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_rows = log_sum_BHt.shape[2]
    query_kernel[(triton.cdiv(num_rows, tile.queries), batch_size * num_heads)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(call.out_BTHE, tile.queries), *parts(call.dout_BTHE, tile.queries),
        *parts(grads.dq_BTHD, tile.queries),
        mask.start_BT, mask.stop_BT, bounds(mask, tile.queries),
        call.slopes_H, call.lse_BHT, call.dlse_BHT,
        log_sum_BHt, shift_BHt,
        num_tokens, num_rows, num_heads, num_heads // k_BTGD.shape[2], call.scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, HAS_SLOPES=call.slopes_H is not None,
        D0=parts_of(q_BTHD.shape[3])[0], D1=second_part(q_BTHD),
        BM=tile.queries, BN=tile.keys, PRECISION=precision_of(q_BTHD), **tile.launch_options,
    )  # fmt: skip


def key_gradients(
    call: BackwardCall,
    grads: BackwardOutputs,
    log_sum_BHt: Tensor,
    shift_BHt: Tensor,
    tile: Tile,
) -> None:
    """Fill dk, dv and, if the call measures, key mass of ``grads``."""
    q_BTHD, k_BTGD, v_BTGE, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_groups = k_BTGD.shape[2]
    key_kernel[(triton.cdiv(num_tokens, tile.keys), batch_size * num_groups)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(call.dout_BTHE, tile.queries), *parts(grads.dk_BTGD, tile.keys),
        *parts(grads.dv_BTGE, tile.keys),
        mask.start_BT, mask.stop_BT, plan(mask, tile.queries, tile.keys), call.slopes_H,
        log_sum_BHt, shift_BHt, grads.key_mass_BHT,
        num_tokens, log_sum_BHt.shape[2], num_groups, num_heads // num_groups, call.scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, HAS_SLOPES=call.slopes_H is not None,
        GRADIENTS=True, MEASURE=call.measures, EVEN=num_tokens % tile.queries == 0,
        D0=parts_of(q_BTHD.shape[3])[0], D1=second_part(q_BTHD),
        E0=parts_of(v_BTGE.shape[3])[0], E1=second_part(v_BTGE),
        BM=tile.queries, BN=tile.keys, PRECISION=precision_of(q_BTHD), **tile.launch_options,
    )  # fmt: skip


def key_mass(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    log_sum_BHT: Tensor,
    mask: MaskTensors,
    slopes_H: Tensor | None,
    scale: float,
    key_mass_BHT: Tensor,
    tile: Tile,
) -> None:
    """Fill ``key_mass_BHT`` where there is no backward pass: the key kernel without gradients."""
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_groups = k_BTGD.shape[2]
    no_values_and_gradients = [None] * 8
    key_kernel[(triton.cdiv(num_tokens, tile.keys), batch_size * num_groups)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *no_values_and_gradients,
        mask.start_BT, mask.stop_BT, plan(mask, tile.queries, tile.keys), slopes_H,
        log_sum_BHT, None, key_mass_BHT,
        num_tokens, log_sum_BHT.shape[2], num_groups, num_heads // num_groups, scale,
        CAUSAL=mask.is_causal, PINNED=mask.pinned > 0, HAS_SLOPES=slopes_H is not None,
        GRADIENTS=False, MEASURE=True, EVEN=num_tokens % tile.queries == 0,
        D0=MIN_PART, D1=MIN_PART, E0=MIN_PART, E1=MIN_PART,
        BM=tile.queries, BN=tile.keys, PRECISION=precision_of(q_BTHD), **tile.launch_options,
    )  # fmt: skip
