"""Position encodings: one class and one line in ``POSITIONS`` each.

A kind is built from the decoder's config and overrides what it needs of ``Position``: what is added
to the embeddings, a rotation of queries and keys, or slopes of ALiBi for the kernel.

Axes: B rows, T positions, C width of the residual stream, H heads, D head dim, F = D / 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels.errors import require
from models.norms import at_least_fp32

if TYPE_CHECKING:
    from models.decoder import DecoderConfig


class Rotation(NamedTuple):
    """The cosines and sines of every position, fp32 or fp64; made once for all layers."""

    cos_BTF: Tensor
    sin_BTF: Tensor

    def __call__(self, x_BTHD: Tensor) -> Tensor:
        """Rotate the pairs (d, d + D/2) of queries or keys; returns x's dtype."""
        cos_BT1F, sin_BT1F = self.cos_BTF[:, :, None], self.sin_BTF[:, :, None]
        a_BTHF, b_BTHF = at_least_fp32(x_BTHD).chunk(2, dim=-1)
        rotated = (
            a_BTHF * cos_BT1F - b_BTHF * sin_BT1F,
            b_BTHF * cos_BT1F + a_BTHF * sin_BT1F,
        )
        return torch.cat(rotated, dim=-1).to(x_BTHD.dtype)


class Position(nn.Module):
    """No position encoding (NoPE): order is known from the causal mask alone."""

    def __init__(self, config: DecoderConfig):
        super().__init__()

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        """The embedded tokens with the encoding added."""
        return x_BTC

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation | None:
        """What turns queries and keys in every layer; ``dtype`` is fp32 or fp64."""
        return None

    def slopes(self, device: torch.device) -> Tensor | None:
        """ALiBi's slope of each head, [H], for the attention kernel of every layer."""
        return None


class RoPE(Position):
    """Rotary encoding (Su et al., arXiv 2104.09864): pair f turns by position * base^(-2f / D).

    The pairs are (d, d + D/2), the "rotate half" convention of Hugging Face, so weights map one to
    one. The angles come from the batch's positions in every forward, so there is no longest
    context; they are kept as no buffer, which ``.half()`` would round.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        head_dim = config.resolved_head_dim
        require(head_dim % 2 == 0, "model.head_dim", "must be even for rope", head_dim)
        self.head_dim = head_dim
        self.base = config.rope_base

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
        exponent_F = torch.arange(0, self.head_dim, 2, dtype=dtype, device=positions_BT.device)
        frequency_F = 1.0 / self.base ** (exponent_F / self.head_dim)
        angle_BTF = positions_BT[..., None].to(dtype) * frequency_F
        return Rotation(angle_BTF.cos(), angle_BTF.sin())


POSITIONS: dict[str, type[Position]] = {"rope": RoPE, "none": Position}
"""``model.position``: subclasses of ``Position``."""
