"""Attention with statistics on a CPU: batched matrix products over blocks of query rows.

A block of 64 queries against every key it may see is small enough to stay in the cache, so the
probabilities P are written out there: out = P v, and each statistic is one cheap pass over the
same block (a sum, a maximum, a column). Blocks of keys that no query of the block sees are left
out. P is kept for the backward pass up to ``KEEP_BYTES`` a call, else rebuilt from lse.

Measured on two cores with AVX-512 (torch 2.11): forward + backward of (B, H, T, D) =
(16, 4, 256, 32), and a training step of a plain causal model around it (4 layers, width 128, 4096
tokens); milliseconds.

                                    causal   documents   step   step with AVX2 (torch 2.13)
    F.scaled_dot_product_attention      19          23    303    385
    off                                 27          30    309    390
    basic                               28          32    312    389
    full                                39          40    411    432
    reference, basic                    97         103    655    619

Alone, a call pays for fresh memory that a training step has at hand: with the allocator told to
keep it, the first column reads 16, 19, 20. Rebuilding P costs about 4 ms a call; a pass for the
statistics behind PyTorch's own fast attention would have to pay that too.

Axes: B rows of the batch, T query positions, S key positions (S = T), H query heads, G key/value
heads, D query/key head dim, E value head dim. In a tile, n = rows of the batch x heads,
r = query rows, c = keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.cpu_tiles import (
    Tile,
    TiledMask,
    heads_first,
    max_probabilities,
    tile_memory,
    tokens_first,
)
from kernels.attention.statistics import Statistics, StatisticsLevel, mass_at, null_mass
from kernels.masks import IntervalMask

KEEP_BYTES = 2**27
"""Largest size of the probabilities kept for one backward pass: 128 MiB."""


def cpu_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    mask: IntervalMask,
    *,
    scale: float,
    null_logit_BHT: Tensor | None,
    level: StatisticsLevel,
) -> tuple[Tensor, Tensor, Statistics | None]:
    """Output, lse and statistics; fp32 or fp64."""
    operands = [q_BTHD, k_BSGD, v_BSGE, null_logit_BHT]
    needs_backward = torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in operands
    )
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    num_kept = batch_size * num_heads * max_probabilities(num_tokens, mask.is_causal)
    keep = needs_backward and num_kept * q_BTHD.element_size() <= KEEP_BYTES
    if null_logit_BHT is not None:
        null_logit_BHT = null_logit_BHT.to(q_BTHD.dtype)
    out_BTHE, lse_BHT, _, first_BHT, document_BHT, key_BHS, max_BH, entropy_BHT = _forward(
        q_BTHD,
        k_BSGD,
        v_BSGE,
        mask.start_BT,
        mask.stop_BT,
        mask.document_start_BT,
        null_logit_BHT,
        mask.pinned,
        mask.is_causal,
        scale,
        level.value,
        keep,
    )
    if level is StatisticsLevel.off:
        return out_BTHE, lse_BHT, None
    statistics = Statistics(
        first_mass_BHT=first_BHT,
        document_mass_BHT=document_BHT,
        null_mass_BHT=(
            None if null_logit_BHT is None else null_mass(null_logit_BHT.detach(), lse_BHT.detach())
        ),
        key_mass_BHS=key_BHS,
        max_logit_BH=max_BH,
        entropy_BHT=entropy_BHT if level is StatisticsLevel.full else None,
    )
    return out_BTHE, lse_BHT, statistics


def _scores_bHrc(
    q_BHTD: Tensor, k_BHSD: Tensor, mask: TiledMask, tile: Tile, memory: Tensor
) -> Tensor:
    """A tile's scores, -inf where hidden, in the first elements of ``memory``."""
    shape = (
        tile.b.stop - tile.b.start,
        q_BHTD.shape[1],
        tile.r.stop - tile.r.start,
        tile.c.stop - tile.c.start,
    )
    scores_bHrc = memory[: tile.kept.stop - tile.kept.start].view(shape)
    q_nrD = q_BHTD[tile.b].flatten(0, 1)[:, tile.r]
    k_ncD = k_BHSD[tile.b].flatten(0, 1)[:, tile.c]
    torch.bmm(q_nrD, k_ncD.mT, out=scores_bHrc.flatten(0, 1))
    mask.hide_(scores_bHrc, tile)
    return scores_bHrc


@torch.library.custom_op(
    "sinklab::cpu_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor start, Tensor stop, Tensor document_start, "
    "Tensor? null_logit, int pinned, bool is_causal, float scale, str level, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q_BTHD,
    k_BSGD,
    v_BSGE,
    start_BT,
    stop_BT,
    document_start_BT,
    null_logit_BHT,
    pinned,
    is_causal,
    scale,
    level,
    keep,
):
    """out, lse, kept P, first mass, document mass, key mass, max logit, entropy.

    What isn't asked for has no elements.
    """
    mask = TiledMask(start_BT, stop_BT, pinned, is_causal)
    num_heads = q_BTHD.shape[2]
    outputs = _empty_outputs(q_BTHD, v_BSGE, is_causal, level, keep)
    out_BTHE, lse_BHT, kept, first_BHT, document_BHT, key_BHS, max_BH, entropy_BHT = outputs
    for total in (out_BTHE, first_BHT, document_BHT, key_BHS, entropy_BHT):
        total.zero_()
    # A row's largest score, and the P of that key without the null slot.
    top_BHT, share_BHT = torch.zeros_like(lse_BHT), torch.ones_like(lse_BHT)

    q_BHTD = heads_first(q_BTHD, num_heads, scale)
    k_BHSD = heads_first(k_BSGD, num_heads)
    v_BHSE = heads_first(v_BSGE, num_heads)
    scratch = None if keep else tile_memory(q_BTHD)
    for tile in mask.tiles(num_heads):
        b, r, c = tile.b, tile.r, tile.c
        p_bHrc = _scores_bHrc(q_BHTD, k_BHSD, mask, tile, kept[tile.kept] if keep else scratch)
        # A row of -inf would make softmax NaN.
        mask.empty_(p_bHrc, tile)
        top_BHT[b, :, r] = p_bHrc.amax(-1)
        # In place: a row is read before it is written.
        torch.softmax(p_bHrc, -1, out=p_bHrc)
        share_BHT[b, :, r] = p_bHrc.amax(-1)
        if null_logit_BHT is not None:
            without_null_bHr = top_BHT[b, :, r] - share_BHT[b, :, r].log()
            p_bHrc.mul_(torch.sigmoid(without_null_bHr - null_logit_BHT[b, :, r])[..., None])
        mask.empty_(p_bHrc, tile)
        out_nrE = torch.bmm(p_bHrc.flatten(0, 1), v_BHSE[b].flatten(0, 1)[:, c])
        out_BTHE[b, r] = out_nrE.unflatten(0, (-1, num_heads)).transpose(1, 2)

        if level == StatisticsLevel.off:
            continue
        if c.start == 0:
            first_BHT[b, :, r] = p_bHrc[..., 0]
        document_BHT[b, :, r] = mass_at(p_bHrc, document_start_BT[b, r] - c.start)
        key_BHS[b, :, c] += p_bHrc.sum(2)
        if level == StatisticsLevel.full:
            entropy_BHT[b, :, r] = torch.special.entr(p_bHrc).sum(-1)

    # log P = score - lse holds at the largest score, where P can't underflow.
    torch.sub(top_BHT, share_BHT.log(), out=lse_BHT)
    if null_logit_BHT is not None:
        torch.logaddexp(lse_BHT, null_logit_BHT, out=lse_BHT)
    if mask.empty_BT is not None:
        for row_BHT in (top_BHT, lse_BHT):
            row_BHT.masked_fill_(mask.empty_BT[:, None], -torch.inf)
    if level != StatisticsLevel.off:
        torch.amax(top_BHT, -1, out=max_BH)
    if level == StatisticsLevel.full and null_logit_BHT is not None:
        entropy_BHT += torch.special.entr(null_mass(null_logit_BHT, lse_BHT))
    return outputs


@_forward.register_fake
def _(q, k, v, start, stop, document_start, null_logit, pinned, is_causal, scale, level, keep):
    return _empty_outputs(q, v, is_causal, level, keep)


def _empty_outputs(
    q_BTHD: Tensor, v_BSGE: Tensor, is_causal: bool, level: str, keep: bool
) -> tuple[Tensor, ...]:
    batch_size, num_tokens, num_heads, _ = q_BTHD.shape
    nothing = (0,)
    BHT = (batch_size, num_heads, num_tokens)
    BH = BHT[:2]
    measures = level != StatisticsLevel.off
    num_kept = batch_size * num_heads * max_probabilities(num_tokens, is_causal)
    shapes = (
        (batch_size, num_tokens, num_heads, v_BSGE.shape[3]),
        BHT,
        (num_kept,) if keep else nothing,
        BHT if measures else nothing,
        BHT if measures else nothing,
        BHT if measures else nothing,
        BH if measures else nothing,
        BHT if level == StatisticsLevel.full else nothing,
    )
    return tuple(q_BTHD.new_empty(shape) for shape in shapes)


@torch.library.custom_op(
    "sinklab::cpu_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad_out, Tensor shift, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor kept, "
    "Tensor start, Tensor stop, int pinned, bool is_causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out_BTHE,
    shift_BHT,
    q_BTHD,
    k_BSGD,
    v_BSGE,
    lse_BHT,
    kept,
    start_BT,
    stop_BT,
    pinned,
    is_causal,
    scale,
):
    """Gradients of q, k and v from dS = P (dP + shift), shift = dlse - delta."""
    mask = TiledMask(start_BT, stop_BT, pinned, is_causal)
    num_heads, num_groups = q_BTHD.shape[2], k_BSGD.shape[2]
    q_BHTD = heads_first(q_BTHD, num_heads)
    k_BHSD = heads_first(k_BSGD, num_heads, scale)
    v_BHSE = heads_first(v_BSGE, num_heads)
    grad_out_BHTE = heads_first(grad_out_BTHE, num_heads)
    grad_q_BTHD = torch.zeros_like(q_BTHD, memory_format=torch.contiguous_format)
    grad_k_BHSD, grad_v_BHSE = torch.zeros_like(k_BHSD), torch.zeros_like(v_BHSE)
    # A finite lse keeps exp(-inf - lse) at 0 in the hidden scores of an empty row.
    finite_lse_BHT = lse_BHT.masked_fill(lse_BHT == -torch.inf, 0)
    scratch = None if kept.numel() else tile_memory(q_BTHD)
    grad_scratch = tile_memory(q_BTHD)
    for tile in mask.tiles(num_heads):
        b, r, c = tile.b, tile.r, tile.c
        if scratch is None:
            p_nrc = kept[tile.kept].view(-1, r.stop - r.start, c.stop - c.start)
        else:
            p_bHrc = _scores_bHrc(q_BHTD, k_BHSD, mask, tile, scratch)
            p_nrc = p_bHrc.sub_(finite_lse_BHT[b, :, r, None]).exp_().flatten(0, 1)
        grad_out_nrE = grad_out_BHTE[b].flatten(0, 1)[:, r]
        grad_s_nrc = grad_scratch[: p_nrc.numel()].view_as(p_nrc)
        torch.bmm(grad_out_nrE, v_BHSE[b].flatten(0, 1)[:, c].mT, out=grad_s_nrc)
        grad_s_nrc.add_(shift_BHT[b].flatten(0, 1)[:, r, None]).mul_(p_nrc)
        grad_v_BHSE[b].flatten(0, 1)[:, c] += torch.bmm(p_nrc.mT, grad_out_nrE)
        grad_k_BHSD[b].flatten(0, 1)[:, c] += torch.bmm(
            grad_s_nrc.mT, q_BHTD[b].flatten(0, 1)[:, r]
        )
        grad_q_nrD = torch.bmm(grad_s_nrc, k_BHSD[b].flatten(0, 1)[:, c])
        grad_q_BTHD[b, r] = grad_q_nrD.unflatten(0, (-1, num_heads)).transpose(1, 2)
    return (
        grad_q_BTHD,
        tokens_first(grad_k_BHSD, num_groups, scale),
        tokens_first(grad_v_BHSE, num_groups),
    )


@_backward.register_fake
def _(grad_out, shift, q, k, v, lse, kept, start, stop, pinned, is_causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, start, stop, _, null_logit, pinned, is_causal, scale, _, _ = inputs
    out, lse, kept, *statistics = output
    ctx.save_for_backward(q, k, v, start, stop, null_logit, out, lse, kept)
    ctx.static = (pinned, is_causal, scale)
    ctx.mark_non_differentiable(kept, *statistics)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out_BTHE, grad_lse_BHT, *_):
    q, k, v, start, stop, null_logit_BHT, out_BTHE, lse_BHT, kept = ctx.saved_tensors
    if grad_out_BTHE is None:
        grad_out_BTHE = torch.zeros_like(out_BTHE)
    shift_BHT = -(grad_out_BTHE * out_BTHE).sum(-1).transpose(1, 2)
    if grad_lse_BHT is not None:
        shift_BHT = shift_BHT + grad_lse_BHT
    shift_BHT = shift_BHT.masked_fill(lse_BHT == -torch.inf, 0).contiguous()
    grad_q, grad_k, grad_v = _backward(
        grad_out_BTHE, shift_BHT, q, k, v, lse_BHT, kept, start, stop, *ctx.static
    )
    grad_null_BHT = None
    if null_logit_BHT is not None:
        grad_null_BHT = null_mass(null_logit_BHT, lse_BHT) * shift_BHT
    return grad_q, grad_k, grad_v, None, None, None, grad_null_BHT, *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_setup_context)
