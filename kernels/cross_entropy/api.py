"""Loss of the next token from the last hidden states, without keeping all their logits.

Axes: N tokens, C width of the residual stream, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import checks
from kernels.errors import require

IGNORE_LABEL = -100
"""Label of a position that takes no loss (the default of ``torch.nn.functional.cross_entropy``)."""


def linear_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """sum_n -log softmax(W x_n)[label_n] in nats over the labelled tokens: a scalar, fp32 or fp64.

    Logits are made in x's dtype, whatever the weight's. vocab_size: rows of W that have a logit,
    the first ones; the rest pad. labels_N: int64, ``IGNORE_LABEL`` for no loss.

    ``triton`` makes the logits of a slice of tokens at a time and leaves their gradient in their
    place, so that the gradients of x and W are ready before the backward pass, which scales them;
    they come from logits' gradients in x's dtype, as autocast makes them. W's is summed in fp32.
    ``reference`` is plain PyTorch; ``auto`` takes ``triton`` on GPUs.

    It can be differentiated once. A label that isn't below vocab_size is an error of PyTorch's in
    ``reference``, and makes loss and gradients NaN in ``triton``.

    Raises ``UserError`` for an implementation that doesn't exist or can't run, and for shapes that
    don't fit.
    """
    if vocab_size is None:
        vocab_size = len(weight_VC)
    has_rows = 1 <= vocab_size <= len(weight_VC)
    rule = f"must be from 1 to {len(weight_VC)}, the rows of the weight"
    require(has_rows, "vocab_size", rule, vocab_size)
    fits = labels_N.shape == x_NC.shape[:1] and labels_N.dtype == torch.int64
    rule = f"must be int64 of shape [{len(x_NC)}], one a token"
    require(fits, "labels_N", rule, f"{labels_N.dtype} {list(labels_N.shape)}")
    if not checks.takes_triton(implementation, x_NC):
        with torch.autocast(x_NC.device.type, enabled=False):
            return _reference(x_NC, weight_VC, labels_N, vocab_size)
    # Triton is imported where it is used: machines without it have the reference.
    from kernels.cross_entropy.fused import fused_linear_cross_entropy

    return fused_linear_cross_entropy(x_NC, weight_VC, labels_N, vocab_size)


def _reference(x_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, vocab_size: int) -> Tensor:
    logits_NV = F.linear(x_NC, weight_VC.to(x_NC.dtype))[:, :vocab_size]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_LABEL, reduction="sum")
