"""The decoder as one would write it in plain PyTorch: what ``scripts.bench`` compares with.

Llama-style: rms norms before each half of a block, rope on halves, SwiGLU, no biases, causal
attention by ``F.scaled_dot_product_attention``. Names of weights are those of ``models.decoder``,
whose weights it can load.

Axes: B rows, T positions, C width of the residual stream, H heads, D head dim, F = D / 2, V ids.
"""

from contextlib import nullcontext
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.packing import MaskKind, PositionKind
from kernels.errors import require
from models.attention import attention_name
from models.decoder_config import DecoderConfig, NormPlace
from train.config import RunConfig


def check_plain(config: RunConfig) -> None:
    """Raise ``UserError`` naming the first setting that the plain decoder can't express."""
    model, attention, packing = config.model, config.attention, config.packing
    checks: list[tuple[str, object, tuple]] = [
        ("packing.mask", packing.mask, (MaskKind.causal,)),
        ("packing.positions", packing.positions, (PositionKind.row,)),
        ("packing.prefix", packing.prefix, (0,)),
        ("attention", attention_name(attention), ("softmax",)),
        ("attention.window", attention.window, (None,)),
        ("attention.row_sum", getattr(attention, "row_sum", 1), (1,)),
        ("model.norm", model.norm, ("rms_norm",)),
        ("model.norm_place", model.norm_place, (NormPlace.before,)),
        ("model.position", model.position, ("rope",)),
        ("model.rope_share", model.rope_share, (1,)),
        ("model.feed_forward", model.feed_forward, ("swiglu",)),
        ("model.num_kv_heads", model.num_kv_heads, (None, model.num_heads)),
    ]
    for setting, value, allowed in checks:
        shown = " or ".join("null" if choice is None else str(choice) for choice in allowed)
        got = value.value if isinstance(value, StrEnum) else value
        require(value in allowed, setting, f"must be {shown} for the plain peer", got)


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, width = config.d_model, config.num_heads * config.resolved_head_dim
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(C, config.norm_eps)
        self.attention = nn.ModuleDict(
            {name: nn.Linear(C, width, bias=False) for name in ("query", "key", "value")}
            | {"output": nn.Linear(width, C, bias=False)}
        )
        self.feed_forward_norm = nn.RMSNorm(C, config.norm_eps)
        self.feed_forward = nn.ModuleDict(
            {name: nn.Linear(C, config.d_ff, bias=False) for name in ("gate", "up")}
            | {"output": nn.Linear(config.d_ff, C, bias=False)}
        )

    def forward(self, x_BTC: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        h_BTC = self.attention_norm(x_BTC)
        q_BHTD, k_BHTD, v_BHTD = (
            self.attention[name](h_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        q_BHTD, k_BHTD = rotated(q_BHTD, cos_TF, sin_TF), rotated(k_BHTD, cos_TF, sin_TF)
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.attention["output"](out_BHTD.transpose(1, 2).flatten(2))
        h_BTC = self.feed_forward_norm(x_BTC)
        inner = F.silu(self.feed_forward["gate"](h_BTC)) * self.feed_forward["up"](h_BTC)
        return x_BTC + self.feed_forward["output"](inner)


def rotated(x_BHTD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Pairs (d, d + F) turned by their position's angle, in fp32; returns x's dtype."""
    a_BHTF, b_BHTF = x_BHTD.float().chunk(2, dim=-1)
    turned = (a_BHTF * cos_TF - b_BHTF * sin_TF, b_BHTF * cos_TF + a_BHTF * sin_TF)
    return torch.cat(turned, dim=-1).to(x_BHTD.dtype)


class PlainDecoder(nn.Module):
    """The summed cross-entropy of rows of ``context`` tokens.

    vocab_size: ids that have a probability; the embedding is padded as the config says.
    ``backend`` is the kernel that attention may use, None for PyTorch's own choice. It is an
    attribute read inside ``forward`` so that ``torch.compile`` guards it: a choice made around a
    compiled module is silently that of whoever compiled first.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, context: int):
        super().__init__()
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.vocab_size = vocab_size
        self.backend: SDPBackend | None = None
        self.embedding = nn.Embedding(padded, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = (
            None if config.tie_embeddings else nn.Linear(config.d_model, padded, bias=False)
        )
        half = config.resolved_head_dim // 2
        rate_F = config.rope_base ** -(torch.arange(half) / half)
        angle_TF = torch.arange(context)[:, None] * rate_F
        self.register_buffer("cos_TF", angle_TF.cos(), persistent=False)
        self.register_buffer("sin_TF", angle_TF.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(tokens_BT)
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            for block in self.blocks:
                x_BTC = block(x_BTC, self.cos_TF, self.sin_TF)
        weight_VC = (self.embedding if self.unembedding is None else self.unembedding).weight
        logits_BTV = F.linear(self.norm(x_BTC), weight_VC)[..., : self.vocab_size]
        logits_NV = logits_BTV.flatten(0, 1).float()
        return F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="sum")
