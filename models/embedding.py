"""The embedding of tokens, with a gradient that a compiler leaves alone.

Axes: V rows of the table, C width of the residual stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` without options, whose gradient is PyTorch's own sum over an id's tokens.

    The compiler would make it an accumulating write, which deterministic algorithms do one token
    after the other, the many of a frequent word too: 3 % of a training step.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: ids, int64 or int32, [...]; [..., C] in the weight's dtype."""
        return _embedding(self.weight, tokens)


@torch.library.custom_op("sinklab::embedding", mutates_args=())
def _embedding(weight_VC: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight_VC)


@_embedding.register_fake
def _(weight_VC, tokens):
    return weight_VC.new_empty(*tokens.shape, weight_VC.shape[1])


@torch.library.custom_op("sinklab::embedding_gradient", mutates_args=())
def _gradient(gradient: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    """[V, C], V = ``num_rows``: for each id the sum over its tokens' gradients."""
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, num_rows, -1, False)


@_gradient.register_fake
def _(gradient, tokens, num_rows):
    return gradient.new_empty(num_rows, gradient.shape[-1])


def _keep_for_embedding(ctx, inputs, output):
    weight_VC, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.num_rows = len(weight_VC)


def _differentiate_embedding(ctx, gradient):
    (tokens,) = ctx.saved_tensors
    return _gradient(gradient, tokens, ctx.num_rows), None


def _keep_for_gradient(ctx, inputs, output):
    _, tokens, _ = inputs
    ctx.save_for_backward(tokens)


def _differentiate_gradient(ctx, gradient_VC):
    # A sum over tokens is linear, and its transpose is the embedding again.
    (tokens,) = ctx.saved_tensors
    return _embedding(gradient_VC, tokens), None, None


_embedding.register_autograd(_differentiate_embedding, setup_context=_keep_for_embedding)
_gradient.register_autograd(_differentiate_gradient, setup_context=_keep_for_gradient)
