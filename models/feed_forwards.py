"""Feed-forward layers: one class and one line in ``FEED_FORWARDS`` each.

Axes: B rows, T positions, C width of the residual stream, F inner width, P = 2 F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.swiglu import swiglu


class FeedForward(nn.Module):
    """y = W_output a(W_up x), inner width d_ff; a is the kind's ``activation``."""

    activation: ClassVar[Callable[[Tensor], Tensor]]
    inputs: ClassVar[tuple[str, ...]] = ("up",)

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        for name in self.inputs:
            self.add_module(name, nn.Linear(d_model, d_ff, bias=False))
        self.output = nn.Linear(d_ff, d_model, bias=False)

    def inner(self, x_BTC: Tensor) -> Tensor:
        """What the output projection takes, [B, T, d_ff]."""
        return self.activation(self.up(x_BTC))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.output(self.inner(x_BTC))


class GatedFeedForward(FeedForward):
    """y = W_output (a(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202)."""

    inputs = ("gate", "up")

    def inner(self, x_BTC: Tensor) -> Tensor:
        # One product: its backward pass makes one gradient of x, not two to be added.
        weight_PC = torch.cat([self.gate.weight, self.up.weight])
        return self.gated(F.linear(x_BTC, weight_PC))

    def gated(self, x_BTP: Tensor) -> Tensor:
        """a(gate) * up of both products side by side."""
        gate_BTF, up_BTF = x_BTP.chunk(2, dim=-1)
        return self.activation(gate_BTF) * up_BTF


class ReLU(FeedForward):
    """a(x) = max(x, 0)."""

    activation = staticmethod(F.relu)


class GeLU(FeedForward):
    """a(x) = x Phi(x), Phi the normal distribution function (arXiv 1606.08415)."""

    activation = staticmethod(F.gelu)


class Swish(FeedForward):
    """a(x) = x / (1 + exp(-x)), SiLU too (arXiv 1710.05941)."""

    activation = staticmethod(F.silu)


class ReGLU(GatedFeedForward):
    """Gated by ReLU."""

    activation = staticmethod(F.relu)


class GeGLU(GatedFeedForward):
    """Gated by GeLU."""

    activation = staticmethod(F.gelu)


class SwiGLU(GatedFeedForward):
    """Gated by Swish."""

    activation = staticmethod(F.silu)
    gated = staticmethod(swiglu)


class SquaredReLU(FeedForward):
    """a(x) = max(x, 0)^2 (Primer, arXiv 2109.08668)."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square()


FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "relu": ReLU,
    "gelu": GeLU,
    "swish": Swish,
    "reglu": ReGLU,
    "geglu": GeGLU,
    "swiglu": SwiGLU,
    "squared_relu": SquaredReLU,
}
"""``model.feed_forward``: subclasses of ``FeedForward``."""
