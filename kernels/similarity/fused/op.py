"""The Triton kernels as PyTorch operators: fake kernels, gradients, FLOP counts.

``sinklab::similarity`` is functional. Key mass leaves as the gradient of the tap, a leaf of zeros,
so that activation checkpointing, which runs the forward twice, and compiled graphs count it once.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.attention.flops import backward_flops, forward_flops, key_mass_flops
from kernels.attention.fused.tensors import MaskTensors, as_loadable
from kernels.attention.statistics import Statistics, StatisticsLevel
from kernels.masks import IntervalMask
from kernels.similarity.fused import launch
from kernels.similarity.fused.tensors import BackwardOutputs, Call, ForwardOutputs
from kernels.similarity.similarities import Normalize, Similarity


def fused_similarity(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGE: Tensor,
    mask: IntervalMask,
    *,
    similarity: Similarity,
    normalize: Normalize,
    scale: float,
    bias: float,
    slopes_H: Tensor | None,
    level: StatisticsLevel,
    tap_BHT: Tensor | None,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Output, row sums and statistics; key mass is the tap's gradient, or computed here."""
    intervals = (mask.start_BT, mask.stop_BT)
    kind = (mask.pinned, mask.is_causal)
    outputs = ForwardOutputs(
        *_similarity(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            tap_BHT,
            slopes_H,
            *intervals,
            mask.document_start_BT,
            *kind,
            mask.one_document,
            scale,
            bias,
            similarity.value,
            normalize.value,
            level.value,
        )
    )
    if level is StatisticsLevel.off:
        return outputs.out_BTHE, outputs.abs_BHT, None
    key_mass_BHT = None
    if tap_BHT is None:
        with torch.no_grad():
            key_mass_BHT = _key_mass(
                q_BTHD,
                k_BTGD,
                outputs.abs_BHT,
                outputs.norm_BHT,
                slopes_H,
                *intervals,
                *kind,
                scale,
                bias,
                similarity.value,
            )
    statistics = Statistics(
        first_mass_BHT=outputs.first_BHT,
        # An operator may not return the same tensor twice.
        document_mass_BHT=outputs.first_BHT if mask.one_document else outputs.document_BHT,
        null_mass_BHT=None,
        key_mass_BHS=key_mass_BHT,
        max_logit_BH=outputs.max_BH,
        entropy_BHT=outputs.entropy_BHT if level is StatisticsLevel.full else None,
    )
    return outputs.out_BTHE, outputs.abs_BHT, statistics


def forward_outputs(
    q: Tensor, v: Tensor, one_document: bool, similarity: str, normalize: str, level: str
) -> ForwardOutputs:
    """Fresh outputs; what isn't asked for, or is another output already, has no elements."""
    batch_size, num_tokens, num_heads, _ = q.shape
    BHT = (batch_size, num_heads, num_tokens)
    measures = level != StatisticsLevel.off
    signed = similarity == Similarity.identity and normalize != Normalize.none

    def row_values(wanted: bool, shape=BHT) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return ForwardOutputs(
        out_BTHE=q.new_empty((batch_size, num_tokens, num_heads, v.shape[3])),
        abs_BHT=row_values(True),
        norm_BHT=row_values(signed or similarity == Similarity.softpick),
        first_BHT=row_values(measures),
        document_BHT=row_values(measures and not one_document),
        max_BH=row_values(measures, BHT[:2]),
        entropy_BHT=row_values(level == StatisticsLevel.full),
    )


@torch.library.custom_op(
    "sinklab::similarity",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? tap, Tensor? slopes, Tensor start, Tensor stop, "
    "Tensor document_start, int pinned, bool is_causal, bool one_document, float scale, "
    "float bias, str similarity, str normalize, str level) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _similarity(
    q,
    k,
    v,
    tap,
    slopes,
    start,
    stop,
    document_start,
    pinned,
    is_causal,
    one_document,
    scale,
    bias,
    similarity,
    normalize,
    level,
):
    """out, sums of absolute weights, log2 N or signed sums, first mass, document mass, max logit,
    entropy.
    """
    outputs = forward_outputs(q, v, one_document, similarity, normalize, level)
    mask = MaskTensors(start, stop, document_start, pinned, is_causal, one_document)
    call = _call(q, k, v, mask, slopes, scale, bias, similarity, normalize, level)
    # Triton launches on the current device, which need not be the tensors'; and never nothing.
    with torch.cuda.device_of(q):
        if len(q):
            launch.forward(call, outputs)
    return tuple(outputs)


@_similarity.register_fake
def _(*inputs):
    q, _, v, *_, one_document, _, _, similarity, normalize, level = inputs
    return tuple(forward_outputs(q, v, one_document, similarity, normalize, level))


@torch.library.custom_op(
    "sinklab::similarity_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor abs, Tensor norm, "
    "Tensor? slopes, Tensor start, Tensor stop, int pinned, bool is_causal, float scale, "
    "float bias, str similarity, str normalize, str level) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _similarity_backward(
    dout,
    q,
    k,
    v,
    out,
    abs,
    norm,
    slopes,
    start,
    stop,
    pinned,
    is_causal,
    scale,
    bias,
    similarity,
    normalize,
    level,
):
    """dq, dk, dv, key mass (no elements at level off)."""
    grads = backward_outputs(q, k, v, abs, level)
    # Documents take no part in the visibility.
    mask = MaskTensors(start, stop, start, pinned, is_causal, one_document=False)
    call = _call(q, k, v, mask, slopes, scale, bias, similarity, normalize, level)
    with torch.cuda.device_of(q):
        if len(q):
            launch.backward(call, as_loadable(dout), out, abs, _sum(abs, norm), grads)
    return tuple(grads)


@_similarity_backward.register_fake
def _(*inputs):
    _, q, k, v, _, abs, *_, level = inputs
    return tuple(backward_outputs(q, k, v, abs, level))


def backward_outputs(q: Tensor, k: Tensor, v: Tensor, abs: Tensor, level: str) -> BackwardOutputs:
    """Fresh gradients; key mass has no elements at level off."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    mass = torch.empty_like(abs) if level != StatisticsLevel.off else abs.new_empty(0)
    return BackwardOutputs(dq, dk, dv, mass)


@torch.library.custom_op(
    "sinklab::similarity_key_mass",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor abs, Tensor norm, Tensor? slopes, Tensor start, "
    "Tensor stop, int pinned, bool is_causal, float scale, float bias, str similarity) "
    "-> Tensor",
)
def _key_mass(q, k, abs, norm, slopes, start, stop, pinned, is_causal, scale, bias, similarity):
    """Attention each key received, [B, H, T], from the row sums in a pass of its own."""
    mask = MaskTensors(start, stop, start, pinned, is_causal, one_document=False)
    # P doesn't depend on what divides the weights.
    call = _call(q, k, k, mask, slopes, scale, bias, similarity, Normalize.none.value, "basic")
    key_mass_BHT = torch.empty_like(abs)
    with torch.cuda.device_of(q):
        if len(q):
            launch.key_mass(call, abs, _sum(abs, norm), key_mass_BHT)
    return key_mass_BHT


@_key_mass.register_fake
def _(q, k, abs, *_):
    return torch.empty_like(abs)


def _call(q, k, v, mask, slopes, scale, bias, similarity, normalize, level) -> Call:
    q, k, v = (as_loadable(x) for x in (q, k, v))
    slopes = None if slopes is None else slopes.contiguous()
    return Call(q, k, v, mask, slopes, scale, bias, similarity, normalize, level)


def _sum(abs: Tensor, norm: Tensor) -> Tensor:
    """softpick's log2 N, or the sum that N is made of."""
    return norm if norm.numel() else abs


def _setup_context(ctx, inputs, output):
    q, k, v, tap, slopes, start, stop, _, pinned, is_causal, _, *what, _ = inputs
    out, abs, norm, *statistics = output
    ctx.save_for_backward(q, k, v, slopes, start, stop, out, abs, norm)
    level = "off" if tap is None else "basic"
    ctx.static = (pinned, is_causal, *what, level)
    ctx.mark_non_differentiable(abs, norm, *statistics)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *_):
    q, k, v, slopes, start, stop, out, abs, norm = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, mass = _similarity_backward(
        dout, q, k, v, out, abs, norm, slopes, start, stop, *ctx.static
    )
    return dq, dk, dv, None if ctx.static[-1] == "off" else mass, *[None] * 12


_similarity.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.sinklab.similarity)
def _similarity_flops(q_shape, k_shape, v_shape, *_, out_shape=None, **__) -> int:
    return forward_flops(q_shape, v_shape)


@register_flop_formula(torch.ops.sinklab.similarity_backward)
def _similarity_backward_flops(
    dout_shape, q_shape, k_shape, v_shape, *_, out_shape=None, **__
) -> int:
    return backward_flops(q_shape, v_shape)


register_flop_formula(torch.ops.sinklab.similarity_key_mass)(key_mass_flops)
