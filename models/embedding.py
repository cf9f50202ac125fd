"""The embedding of tokens, with a gradient that a compiler leaves alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` whose gradient is always PyTorch's own sum over the tokens of an id.

    The compiler would make it an accumulating write, which deterministic algorithms do one token
    after the other, the many of a frequent word too: 3 % of a training step.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        return _embedding(self.weight, tokens)


@torch.library.custom_op("sinklab::embedding", mutates_args=())
def _embedding(weight_VC: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight_VC)


@_embedding.register_fake
def _(weight_VC, tokens):
    return weight_VC.new_empty(*tokens.shape, weight_VC.shape[1])


@torch.library.custom_op("sinklab::embedding_gradient", mutates_args=())
def _gradient(gradient: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    """[num_rows, C]: for each id the sum over its tokens' gradients."""
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, num_rows, -1, False)


@_gradient.register_fake
def _(gradient, tokens, num_rows):
    return gradient.new_empty(num_rows, gradient.shape[-1])


def _setup_context(ctx, inputs, output):
    weight_VC, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.num_rows = len(weight_VC)


def _differentiate(ctx, gradient):
    (tokens,) = ctx.saved_tensors
    return _gradient(gradient, tokens, ctx.num_rows), None


_embedding.register_autograd(_differentiate, setup_context=_setup_context)
