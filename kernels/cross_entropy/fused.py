"""The Triton side of ``linear_cross_entropy``: one kernel over the logits of a slice of tokens.

Two passes over a row of logits, the second mostly from the L2 cache: the largest logit and the sum
of exponentials, then the gradient softmax - onehot in the logits' place. cuBLAS does the rest.

Axes: N tokens (n of a slice), C width of the residual stream, V vocabulary with its padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.fused.blocks import LN_2, LOG2_E

SLICE_LOGITS = 2**30
"""Logits made at a time, at most: slices of as many tokens keep every product large."""

MAX_TILE = 16384
"""Logits that a program holds at a time; the fastest from 1024 to 16384 at V = 32k and 50k."""


@triton.jit
def cross_entropy_kernel(
    logits_nV,
    labels_n,
    losses_n,
    vocab_size,
    padded_size,
    WITH_GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loss of a row of logits, which become d loss / d logits if asked for; 0 without a label."""
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_nV + row * padded_size
    columns = tl.arange(0, TILE)
    label = tl.load(labels_n + row)
    if label < 0:
        tl.store(losses_n + row, 0.0)
        if WITH_GRADIENT:
            for start in range(0, padded_size, TILE):
                at = start + columns
                tl.store(logits_V + at, tl.zeros([TILE], tl.float32), at < padded_size)
    else:
        # Before the first pass, whose sums all threads wait for: the second one overwrites it.
        label_logit = tl.load(logits_V + label, label < vocab_size, other=0.0).to(tl.float32)
        # A thread's logits of a tile share a maximum, and so one rescaling. A finite start:
        # -inf - -inf of columns beyond the vocabulary would be NaN.
        largest_K = tl.full([TILE // 8], -1e38, tl.float32)
        total_K = tl.zeros([TILE // 8], tl.float32)
        for start in range(0, vocab_size, TILE):
            x_K8 = tl.reshape(
                _logits(logits_V, start + columns, vocab_size, padded_size, ""), [TILE // 8, 8]
            )
            above_K = tl.maximum(largest_K, tl.max(x_K8, 1))
            total_K *= tl.exp2((largest_K - above_K) * LOG2_E)
            total_K += tl.sum(tl.exp2(x_K8 * LOG2_E - (above_K * LOG2_E)[:, None]), 1)
            largest_K = above_K
        largest = tl.max(largest_K, 0)
        total = tl.sum(total_K * tl.exp2((largest_K - largest) * LOG2_E), 0)
        # A label without a logit: NaN loss and gradients, for which training stops.
        total = tl.where(label < vocab_size, total, float("nan"))
        log2_total = tl.log2(total)
        # The logits' difference first: a sure prediction's loss is far below their rounding.
        tl.store(losses_n + row, log2_total * LN_2 + (largest - label_logit))
        if WITH_GRADIENT:
            log2_sum = largest * LOG2_E + log2_total
            tl.debug_barrier()
            for start in range(0, padded_size, TILE):
                at = start + columns
                # Nobody needs them again: the cache is for rows between their two passes.
                x_V = _logits(logits_V, at, vocab_size, padded_size, "evict_first")
                gradient_V = tl.exp2(x_V * LOG2_E - log2_sum)
                tl.store(logits_V + at, gradient_V, at < padded_size, eviction_policy="evict_first")
            tl.debug_barrier()
            gradient = tl.exp2((label_logit - largest) * LOG2_E - log2_total) - 1.0
            tl.store(logits_V + label, gradient, label < vocab_size)


@triton.jit
def _logits(logits_V, at, vocab_size, padded_size, POLICY: tl.constexpr):
    """Logits at the columns ``at``, fp32, -inf beyond the vocabulary."""
    # Loaded up to the padded size, a multiple of what one instruction loads; the vocabulary isn't.
    x_V = tl.load(logits_V + at, at < padded_size, other=0.0, eviction_policy=POLICY)
    return tl.where(at < vocab_size, x_V.to(tl.float32), -float("inf"))


@torch.library.custom_op(
    "sinklab::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor labels, int vocab_size, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy(x, weight, labels, vocab_size, with_gradient):
    """Loss, and its gradients by x and weight (no elements unless asked for)."""
    x, labels, weight_VC = x.contiguous(), labels.contiguous(), weight.to(x.dtype)
    num_tokens, padded_size = len(x), len(weight)
    losses_N = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    dx_NC, dweight_VC = gradients_like(x, weight, with_gradient)
    slice_size = max(1, min(num_tokens, SLICE_LOGITS // padded_size))
    tile = max(8, min(MAX_TILE, triton.next_power_of_2(padded_size)))
    buffer_nV = x.new_empty(slice_size, padded_size)
    with torch.cuda.device_of(x):
        for start in range(0, num_tokens, slice_size):
            part = slice(start, start + slice_size)
            x_nC = x[part]
            logits_nV = torch.mm(x_nC, weight_VC.T, out=buffer_nV[: len(x_nC)])
            cross_entropy_kernel[(len(x_nC),)](
                logits_nV,
                labels[part],
                losses_N[part],
                vocab_size,
                padded_size,
                WITH_GRADIENT=with_gradient,
                TILE=tile,
                num_warps=max(4, tile // 512),
            )
            if with_gradient:
                torch.mm(logits_nV, weight_VC, out=dx_NC[part])
                _add_product(dweight_VC, logits_nV.T, x_nC, is_first=start == 0)
    if num_tokens == 0:
        dweight_VC.zero_()
    return losses_N.sum(), dx_NC, dweight_VC


def gradients_like(x: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Fresh gradients: x's in its dtype, the weight's in fp32; no elements unless wanted."""
    if not wanted:
        return x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    dx_NC = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx_NC, torch.empty_like(weight, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a b, or = for the first, summed in fp32 whatever the factors' dtype."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif is_first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@_linear_cross_entropy.register_fake
def _(x, weight, labels, vocab_size, with_gradient):
    dx_NC, dweight_VC = gradients_like(x, weight, with_gradient)
    return x.new_empty((), dtype=torch.float32), dx_NC, dweight_VC


def _setup_context(ctx, inputs, output):
    x, weight, *_ = inputs
    _, dx_NC, dweight_VC = output
    ctx.dtypes = x.dtype, weight.dtype
    ctx.save_for_backward(dx_NC, dweight_VC)
    ctx.mark_non_differentiable(dx_NC, dweight_VC)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, dloss, *_):
    dx_NC, dweight_VC = ctx.saved_tensors
    x_dtype, weight_dtype = ctx.dtypes
    return (dloss * dx_NC).to(x_dtype), (dloss * dweight_VC).to(weight_dtype), None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def fused_linear_cross_entropy(
    x_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, vocab_size: int
) -> Tensor:
    """``linear_cross_entropy`` by Triton and cuBLAS."""
    with_gradient = torch.is_grad_enabled() and (x_NC.requires_grad or weight_VC.requires_grad)
    loss, _, _ = _linear_cross_entropy(x_NC, weight_VC, labels_N, vocab_size, with_gradient)
    return loss
