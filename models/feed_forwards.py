"""Feed-forward layers: one class and one line in ``FEED_FORWARDS`` each.

Axes: B rows, T positions, C width of the residual stream.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """y = W_output (silu(W_gate x) * W_up x) with inner width d_ff (Shazeer, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.output = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x_BTC)) * self.up(x_BTC))


FEED_FORWARDS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU}
"""``model.feed_forward``: classes built from (d_model, d_ff) whose last linear is ``output``."""
