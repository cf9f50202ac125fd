"""Launches of the kernels: tiles, grids, and the row values that one hands to another.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim, M query tiles.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.attention.fused.tables import bounds, plan
from kernels.attention.fused.tensors import MIN_PART, parts, parts_of, precision_of, second_part
from kernels.attention.fused.tiles import Tile
from kernels.similarity.fused.backward import key_kernel, query_kernel
from kernels.similarity.fused.forward import forward_kernel
from kernels.similarity.fused.tensors import BackwardOutputs, Call, ForwardOutputs
from kernels.similarity.fused.tiles import tile_for
from kernels.similarity.similarities import SMALLEST_SUM


def forward(call: Call, outputs: ForwardOutputs) -> None:
    """Fill ``outputs``; those that have no elements are not asked for."""
    q_BTHD, k_BTGD, v_BTGE, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    tile = _tile("forward", call)
    measures = call.level != "off"
    num_tiles = triton.cdiv(num_tokens, tile.queries)
    # The largest score of each of M tiles.
    top_BHM = outputs.abs_BHT.new_empty((batch_size, num_heads, num_tiles))
    forward_kernel[(num_tiles, batch_size * num_heads)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(outputs.out_BTHE, tile.queries),
        k_BTGD, *k_BTGD.stride()[:3],
        mask.start_BT, mask.stop_BT, mask.document_start_BT,
        bounds(mask, tile.queries, documents=measures), call.slopes_H,
        outputs.abs_BHT, outputs.norm_BHT, outputs.first_BHT, outputs.document_BHT,
        outputs.entropy_BHT, top_BHM,
        num_tokens, num_heads, num_heads // k_BTGD.shape[2], call.scale, call.bias,
        MEASURE=measures, ENTROPY=call.level == "full", ONE_DOCUMENT=mask.one_document,
        HEAD_DIM=q_BTHD.shape[3], E0=parts_of(v_BTGE.shape[3])[0], E1=second_part(v_BTGE),
        **_kind(call, call.normalize), **_shape(tile, q_BTHD),
    )  # fmt: skip
    if measures:
        torch.amax(top_BHM, -1, out=outputs.max_BH)


def backward(
    call: Call,
    dout_BTHE: Tensor,
    out_BTHE: Tensor,
    abs_BHT: Tensor,
    sum_BHT: Tensor,
    grads: BackwardOutputs,
) -> None:
    """Fill ``grads``; the level of ``call`` says whether key mass is one of them.

    abs, sum: the forward's row sums, and softpick's log2 N or the sum that N is made of.
    """
    measures = call.level != "off"
    is_softpick, is_normalized = call.similarity == "softpick", call.normalize != "none"
    norm_BHT = torch.empty_like(abs_BHT) if is_normalized and not is_softpick else None
    shift_BHT = torch.empty_like(abs_BHT) if is_normalized else None
    base_BHT = torch.empty_like(abs_BHT) if is_softpick else None
    # Positive weights over their sum are shares of it already.
    needs_share = measures and (call.normalize, call.similarity) not in (
        ("sum", "sigmoid"),
        ("sum", "elu"),
    )
    share_BHT = torch.empty_like(abs_BHT) if needs_share else None

    q_BTHD, k_BTGD, v_BTGE, mask = call.q_BTHD, call.k_BTGD, call.v_BTGE, call.mask
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_groups = k_BTGD.shape[2]
    tile = _tile("query", call)
    query_kernel[(triton.cdiv(num_tokens, tile.queries), batch_size * num_heads)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(out_BTHE, tile.queries), *parts(dout_BTHE, tile.queries),
        *parts(grads.dq_BTHD, tile.queries),
        mask.start_BT, mask.stop_BT, bounds(mask, tile.queries), call.slopes_H,
        abs_BHT, sum_BHT, norm_BHT, shift_BHT, base_BHT, share_BHT,
        num_tokens, num_heads, num_heads // num_groups, call.scale, call.bias,
        D0=parts_of(q_BTHD.shape[3])[0], D1=second_part(q_BTHD),
        **_kind(call, call.normalize), **_shape(tile, q_BTHD),
    )  # fmt: skip

    tile = _tile("key", call)
    key_kernel[(triton.cdiv(num_tokens, tile.keys), batch_size * num_groups)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *parts(v_BTGE, tile.keys),
        *parts(dout_BTHE, tile.queries), *parts(grads.dk_BTGD, tile.keys),
        *parts(grads.dv_BTGE, tile.keys),
        mask.start_BT, mask.stop_BT, plan(mask, tile.queries, tile.keys), call.slopes_H,
        sum_BHT if is_softpick else norm_BHT, shift_BHT, base_BHT, share_BHT, grads.key_mass_BHT,
        num_tokens, num_groups, num_heads // num_groups, call.scale, call.bias,
        GRADIENTS=True, MEASURE=measures, EVEN=num_tokens % tile.queries == 0,
        D0=parts_of(q_BTHD.shape[3])[0], D1=second_part(q_BTHD),
        E0=parts_of(v_BTGE.shape[3])[0], E1=second_part(v_BTGE),
        **_kind(call, call.normalize), **_shape(tile, q_BTHD),
    )  # fmt: skip


def key_mass(call: Call, abs_BHT: Tensor, sum_BHT: Tensor, key_mass_BHT: Tensor) -> None:
    """Fill ``key_mass_BHT`` where there is no backward pass: the key kernel without gradients."""
    counts_BHT = abs_BHT >= SMALLEST_SUM
    share_BHT = torch.where(counts_BHT, 1 / torch.where(counts_BHT, abs_BHT, 1.0), 0.0)
    norm_BHT = base_BHT = None
    if call.similarity == "softpick":
        norm_BHT, base_BHT = sum_BHT, torch.exp2(-sum_BHT)
    q_BTHD, k_BTGD, mask = call.q_BTHD, call.k_BTGD, call.mask
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_groups = k_BTGD.shape[2]
    tile = _tile("key_mass", call)
    no_values_and_gradients = [None] * 8
    key_kernel[(triton.cdiv(num_tokens, tile.keys), batch_size * num_groups)](
        *parts(q_BTHD, tile.queries), *parts(k_BTGD, tile.keys), *no_values_and_gradients,
        mask.start_BT, mask.stop_BT, plan(mask, tile.queries, tile.keys), call.slopes_H,
        norm_BHT, None, base_BHT, share_BHT, key_mass_BHT,
        num_tokens, num_groups, num_heads // num_groups, call.scale, call.bias,
        GRADIENTS=False, MEASURE=True, EVEN=num_tokens % tile.queries == 0,
        D0=MIN_PART, D1=MIN_PART, E0=MIN_PART, E1=MIN_PART,
        **_kind(call, "none"), **_shape(tile, q_BTHD),
    )  # fmt: skip


def _tile(kernel: str, call: Call) -> Tile:
    head_dim = max(call.q_BTHD.shape[3], call.v_BTGE.shape[3])
    return tile_for(kernel, call.q_BTHD.device, call.q_BTHD.dtype, head_dim)


def _kind(call: Call, normalize: str) -> dict[str, object]:
    """The constants that all kernels take for what the call computes."""
    return {
        "SIMILARITY": call.similarity,
        "NORMALIZE": normalize,
        "CAUSAL": call.mask.is_causal,
        "PINNED": call.mask.pinned > 0,
        "HAS_SLOPES": call.slopes_H is not None,
    }


def _shape(tile: Tile, q_BTHD: Tensor) -> dict[str, object]:
    """The constants that all kernels take for their tile, and Triton's launch keywords."""
    precision = precision_of(q_BTHD)
    return {"BM": tile.queries, "BN": tile.keys, "PRECISION": precision, **tile.launch_options}
