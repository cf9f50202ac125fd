"""Position encodings: one class and one line in ``POSITIONS`` each.

A kind is built from the decoder's config and overrides what it needs of ``Position``: what is added
to the embeddings, a rotation of queries and keys, or slopes of ALiBi for the kernel.

Axes: B rows, T positions, C width of the residual stream, H heads, D head dim, F pairs of
dimensions (half a head's, or half the residual stream's).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels.errors import require
from models.norms import at_least_fp32

if TYPE_CHECKING:
    from models.decoder_config import DecoderConfig


class Rotation(NamedTuple):
    """The cosines and sines of every position, fp32 or fp64; made once for all layers.

    Dimensions of a head beyond the first 2 F are left as they are.
    """

    cos_BTF: Tensor
    sin_BTF: Tensor

    def __call__(self, x_BTHD: Tensor) -> Tensor:
        """Rotate the pairs (d, d + F) of queries or keys; returns x's dtype."""
        cos_BT1F, sin_BT1F = self.cos_BTF[:, :, None], self.sin_BTF[:, :, None]
        turned = 2 * self.cos_BTF.shape[-1]
        a_BTHF, b_BTHF = at_least_fp32(x_BTHD[..., :turned]).chunk(2, dim=-1)
        rotated = torch.cat(
            [a_BTHF * cos_BT1F - b_BTHF * sin_BT1F, b_BTHF * cos_BT1F + a_BTHF * sin_BT1F], dim=-1
        ).to(x_BTHD.dtype)
        if turned == x_BTHD.shape[-1]:
            return rotated
        return torch.cat([rotated, x_BTHD[..., turned:]], dim=-1)


class Position(nn.Module):
    """No position encoding (NoPE, arXiv 2305.19466): the causal mask alone tells the order.

    max_positions: positions it knows, None without a limit. has_slopes: whether ``slopes`` gives
    any, which not every kind of attention can take.
    """

    max_positions: int | None = None
    has_slopes: bool = False

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
    """Rotary encoding (Su et al., arXiv 2104.09864): pair f turns by position * base^(-f / F).

    The pairs are (d, d + F), the "rotate half" convention of Hugging Face, so weights map one to
    one; F is half the head dim, or ``model.rope_share`` of that. The angles come from the batch's
    positions in every forward, so there is no longest context; they are kept as no buffer, which
    ``.half()`` would round.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        head_dim = config.resolved_head_dim
        require(head_dim % 2 == 0, "model.head_dim", "must be even for rope", head_dim)
        self.num_pairs = round(config.rope_share * head_dim / 2)
        allowed = f"must leave a pair of the head dim {head_dim}"
        require(self.num_pairs >= 1, "model.rope_share", allowed, config.rope_share)
        self.base = config.rope_base

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
        is_double = dtype == torch.float64
        return Rotation(*_cos_and_sin(positions_BT, self.num_pairs, self.base, is_double))


class Sinusoidal(Position):
    """sqrt(C) times the embeddings, plus sin and cos of position * 10000^(-f / F).

    arXiv 1706.03762: without the factor, waves of amplitude 1 drown embeddings of std 0.02.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        even = config.d_model % 2 == 0
        require(even, "model.d_model", "must be even for sinusoidal", config.d_model)

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        dtype = at_least_fp32(x_BTC).dtype
        width = x_BTC.shape[-1]
        angle_BTF = _angles(positions_BT, width // 2, 10000.0, dtype)
        wave_BTC = torch.cat([angle_BTF.sin(), angle_BTF.cos()], dim=-1).to(x_BTC.dtype)
        return width**0.5 * x_BTC + wave_BTC


class Learned(Position):
    """Adds a learned vector a position to the embeddings, ``model.max_positions`` of them."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.max_positions = config.max_positions
        self.table = nn.Embedding(config.max_positions, config.d_model)

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTC + self.table(positions_BT)


class ALiBi(Position):
    """Subtracts slope_h (i - j) from head h's scores, i - j in the row (arXiv 2108.12409).

    slope_h = 2^(-8 (h + 1) / H) for H a power of two; else those of the next lower power of two,
    then every other one of the next higher.
    """

    has_slopes = True

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.num_heads = config.num_heads

    def slopes(self, device: torch.device) -> Tensor:
        lower = 2 ** int(math.log2(self.num_heads))
        exponent_H = torch.arange(1, lower + 1, device=device) * 8 / lower
        odd = 2 * torch.arange(self.num_heads - lower, device=device) + 1
        return 2.0 ** -torch.cat([exponent_H, odd * 4 / lower])


@torch.library.custom_op("sinklab::cos_and_sin", mutates_args=())
def _cos_and_sin(
    positions_BT: Tensor, num_pairs: int, base: float, is_double: bool
) -> tuple[Tensor, Tensor]:
    """Those of ``_angles``. An operator, because the compiler would put powers, cosines and sines
    into every layer's rotation, and compute them again for every head: 15 % of a training step."""
    dtype = torch.float64 if is_double else torch.float32
    # A product keeps the order of its factors' strides, of which the compiler knows nothing.
    angle_BTF = _angles(positions_BT.contiguous(), num_pairs, base, dtype)
    return angle_BTF.cos(), angle_BTF.sin()


@_cos_and_sin.register_fake
def _(positions_BT, num_pairs, base, is_double):
    dtype = torch.float64 if is_double else torch.float32
    shape = (*positions_BT.shape, num_pairs)
    return tuple(positions_BT.new_empty(shape, dtype=dtype) for _ in range(2))


def _angles(positions_BT: Tensor, num_pairs: int, base: float, dtype: torch.dtype) -> Tensor:
    exponent_F = torch.arange(num_pairs, dtype=dtype, device=positions_BT.device) / num_pairs
    return positions_BT[..., None].to(dtype) * (1.0 / base**exponent_F)


POSITIONS: dict[str, type[Position]] = {
    "rope": RoPE,
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "alibi": ALiBi,
}
"""``model.position``: subclasses of ``Position``."""
