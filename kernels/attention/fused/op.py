"""The Triton kernels as PyTorch operators: fake kernels, gradients, FLOP counts.

``sinklab::attention`` is functional. Key mass leaves as the gradient of the tap, a leaf of zeros,
so that activation checkpointing, which runs the forward twice, and compiled graphs count it once.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.attention.flops import backward_flops, forward_flops, key_mass_flops
from kernels.attention.fused import launch
from kernels.attention.fused.tensors import (
    BackwardCall,
    BackwardOutputs,
    ForwardOutputs,
    MaskTensors,
    as_loadable,
)
from kernels.attention.statistics import Statistics, StatisticsLevel
from kernels.masks import IntervalMask


def fused_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask,
    *,
    scale: float,
    null_logit_BHT: Tensor | None,
    slopes_H: Tensor | None,
    level: StatisticsLevel,
    tap_BHT: Tensor | None,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Output, lse and statistics; key mass is the tap's gradient, or computed here without one."""
    intervals = (mask.start_BT, mask.stop_BT)
    kind = (mask.pinned, mask.is_causal)
    out_BTHE, lse_BHT, first_BHT, document_BHT, null_BHT, max_BH, entropy_BHT = _attention(
        q_BTHD,
        k_BTGD,
        v_BTGE,
        null_logit_BHT,
        tap_BHT,
        slopes_H,
        *intervals,
        mask.document_start_BT,
        *kind,
        mask.one_document,
        scale,
        level.value,
    )
    if level is StatisticsLevel.off:
        return out_BTHE, lse_BHT, None
    key_mass_BHT = None
    if tap_BHT is None:
        with torch.no_grad():
            key_mass_BHT = _key_mass(q_BTHD, k_BTGD, lse_BHT, slopes_H, *intervals, *kind, scale)
    statistics = Statistics(
        first_mass_BHT=first_BHT,
        # An operator may not return the same tensor twice.
        document_mass_BHT=first_BHT if mask.one_document else document_BHT,
        null_mass_BHT=None if null_logit_BHT is None else null_BHT,
        key_mass_BHS=key_mass_BHT,
        max_logit_BH=max_BH,
        entropy_BHT=entropy_BHT if level is StatisticsLevel.full else None,
    )
    return out_BTHE, lse_BHT, statistics


def forward_outputs(
    q: Tensor, v: Tensor, null_logit: Tensor | None, level: str, one_document: bool
) -> ForwardOutputs:
    """Fresh outputs; what isn't asked for, or is first mass already, has no elements."""
    batch_size, num_tokens, num_heads, _ = q.shape
    BHT = (batch_size, num_heads, num_tokens)
    measures = level != StatisticsLevel.off

    def row_values(wanted: bool, shape=BHT) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return ForwardOutputs(
        out_BTHE=q.new_empty((batch_size, num_tokens, num_heads, v.shape[3])),
        lse_BHT=row_values(True),
        first_BHT=row_values(measures),
        document_BHT=row_values(measures and not one_document),
        null_BHT=row_values(measures and null_logit is not None),
        max_BH=row_values(measures, BHT[:2]),
        entropy_BHT=row_values(level == StatisticsLevel.full),
    )


@torch.library.custom_op(
    "sinklab::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? null_logit, Tensor? tap, Tensor? slopes, "
    "Tensor start, Tensor stop, Tensor document_start, int pinned, bool is_causal, "
    "bool one_document, float scale, str level) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention(
    q,
    k,
    v,
    null_logit,
    tap,
    slopes,
    start,
    stop,
    document_start,
    pinned,
    is_causal,
    one_document,
    scale,
    level,
):
    """out, lse, first mass, document mass, null mass, max logit, entropy."""
    outputs = forward_outputs(q, v, null_logit, level, one_document)
    mask = MaskTensors(start, stop, document_start, pinned, is_causal, one_document)
    q, k, v = (as_loadable(x) for x in (q, k, v))
    slopes = None if slopes is None else slopes.contiguous()
    # Triton launches on the current device, which need not be the tensors'; and never nothing.
    with torch.cuda.device_of(q):
        if len(q):
            launch.forward(q, k, v, mask, null_logit, slopes, scale, level, outputs)
    return tuple(outputs)


@_attention.register_fake
def _(*inputs):
    q, _, v, null_logit, *_, one_document, _, level = inputs
    return tuple(forward_outputs(q, v, null_logit, level, one_document))


@torch.library.custom_op(
    "sinklab::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? slopes, Tensor start, Tensor stop, int pinned, bool is_causal, float scale, "
    "str level) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout, dlse, q, k, v, out, lse, slopes, start, stop, pinned, is_causal, scale, level
):
    """dq, dk, dv, shift, key mass (no elements at level off)."""
    grads = backward_outputs(q, k, v, lse, level)
    # Documents take no part in the visibility.
    mask = MaskTensors(start, stop, start, pinned, is_causal, one_document=False)
    dout, q, k, v = (as_loadable(x) for x in (dout, q, k, v))
    dlse, slopes = (None if x is None else x.contiguous() for x in (dlse, slopes))
    measures = level != StatisticsLevel.off
    call = BackwardCall(dout, dlse, q, k, v, out, lse, mask, slopes, scale, measures)
    with torch.cuda.device_of(q):
        if len(q):
            launch.backward(call, grads)
    return tuple(grads)


@_attention_backward.register_fake
def _(*inputs):
    _, _, q, k, v, _, lse, *_, level = inputs
    return tuple(backward_outputs(q, k, v, lse, level))


def backward_outputs(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, level: str) -> BackwardOutputs:
    """Fresh gradients and row values; key mass has no elements at level off."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    mass = torch.empty_like(lse) if level != StatisticsLevel.off else lse.new_empty(0)
    return BackwardOutputs(dq, dk, dv, torch.empty_like(lse), mass)


@torch.library.custom_op(
    "sinklab::key_mass",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor lse, Tensor? slopes, Tensor start, Tensor stop, "
    "int pinned, bool is_causal, float scale) -> Tensor",
)
def _key_mass(q, k, lse, slopes, start, stop, pinned, is_causal, scale):
    """Attention each key received, [B, H, T], from lse in a pass of its own."""
    mask = MaskTensors(start, stop, start, pinned, is_causal, one_document=False)
    key_mass_BHT = torch.empty_like(lse)
    q, k = as_loadable(q), as_loadable(k)
    slopes = None if slopes is None else slopes.contiguous()
    with torch.cuda.device_of(q):
        if len(q):
            launch.key_mass(q, k, lse, mask, slopes, scale, key_mass_BHT)
    return key_mass_BHT


@_key_mass.register_fake
def _(q, k, lse, *_):
    return torch.empty_like(lse)


def _setup_context(ctx, inputs, output):
    q, k, v, null_logit, tap, slopes, start, stop, _, pinned, is_causal, _, scale, _ = inputs
    out, lse, *statistics = output
    ctx.save_for_backward(q, k, v, null_logit, slopes, start, stop, out, lse)
    ctx.static = (pinned, is_causal, scale, "off" if tap is None else "basic")
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, *_):
    q, k, v, null_logit, slopes, start, stop, out, lse = ctx.saved_tensors
    pinned, is_causal, scale, level = ctx.static
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, shift, mass = _attention_backward(
        dout, dlse, q, k, v, out, lse, slopes, start, stop, pinned, is_causal, scale, level
    )
    dnull = None
    if null_logit is not None:
        # dnull_i = P_null,i (dlse_i - dout_i.out_i); an empty row has no null slot.
        is_empty = lse == -torch.inf
        weight = torch.exp(null_logit.float() - lse.masked_fill(is_empty, torch.inf))
        dnull = (-weight * shift).to(null_logit.dtype)
    return dq, dk, dv, dnull, None if level == "off" else mass, *[None] * 9


_attention.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.sinklab.attention)
def _attention_flops(q_shape, k_shape, v_shape, *_, out_shape=None, **__) -> int:
    return forward_flops(q_shape, v_shape)


@register_flop_formula(torch.ops.sinklab.attention_backward)
def _attention_backward_flops(
    dout_shape, dlse_shape, q_shape, k_shape, v_shape, *_, out_shape=None, **__
) -> int:
    return backward_flops(q_shape, v_shape)


register_flop_formula(torch.ops.sinklab.key_mass)(key_mass_flops)
