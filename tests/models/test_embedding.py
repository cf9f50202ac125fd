"""The embedding against PyTorch's own."""

import pytest
import torch
from torch import nn

from models import embedding
from models.embedding import TokenEmbedding

TOKENS = torch.tensor([[0, 3, 3, 1], [3, 6, 0, 3]])
"""Ids with repetitions, the last one among them, and some that don't occur."""


def pair(dtype=torch.float32) -> tuple[TokenEmbedding, nn.Embedding]:
    """Ours and PyTorch's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = TokenEmbedding(7, 5).to(dtype), nn.Embedding(7, 5).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vectors_and_gradient_are_those_of_pytorch(dtype):
    ours, theirs = pair(dtype)
    # Transposed, so that the gradient that arrives isn't contiguous.
    scale = torch.randn(5, 4, 2, dtype=dtype)
    for tokens in (TOKENS, TOKENS.int(), TOKENS[:0]):
        outputs = [table(tokens) for table in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        gradients = [
            torch.autograd.grad((y.transpose(0, 2) * scale[..., : len(tokens)]).sum(), table.weight)
            for y, table in zip(outputs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_it_can_be_differentiated_again():
    weight_VC = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    function = (embedding._embedding, (weight_VC, TOKENS))
    assert torch.autograd.gradcheck(*function) and torch.autograd.gradgradcheck(*function)


def test_the_operators_keep_their_promises():
    ours, _ = pair()
    gradient = torch.randn(2, 4, 5, requires_grad=True)
    for operator, arguments in (
        (embedding._embedding, (ours.weight, TOKENS)),
        (embedding._gradient, (gradient, TOKENS, 7)),
        (embedding._gradient, (gradient.detach().mT.contiguous().mT, TOKENS, 7)),
    ):
        torch.library.opcheck(operator, arguments)


def test_a_compiler_leaves_the_gradient_alone():
    """The operators are in its graphs; forward, then backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = []

    def remember(graph, _):
        called.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    ours, theirs = pair()
    compiled = torch.compile(
        ours, fullgraph=True, backend=aot_autograd(fw_compiler=remember), dynamic=False
    )
    for table in (compiled, theirs):
        table(TOKENS).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=0)
    forward, backward = called
    assert "sinklab.embedding.default" in forward
    assert "sinklab.embedding_gradient.default" in backward


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(TypeError, match="padding_idx"):
        TokenEmbedding(7, 5, padding_idx=0)
