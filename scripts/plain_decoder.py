"""The decoder as one would write it in plain PyTorch: what ``scripts.bench`` compares with.

Llama-style: rms norms before each half of a block, rope on halves, SwiGLU, untied, no biases.
Names of weights are those of ``models.decoder``, whose weights it can load.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, D = config.d_model, config.num_heads, config.resolved_head_dim
        self.num_heads = H
        self.attention_norm = nn.RMSNorm(C, config.norm_eps)
        self.attention = nn.ModuleDict(
            {n: nn.Linear(C, H * D, bias=False) for n in ("query", "key", "value")}
            | {"output": nn.Linear(H * D, C, bias=False)}
        )
        self.feed_forward_norm = nn.RMSNorm(C, config.norm_eps)
        self.feed_forward = nn.ModuleDict(
            {n: nn.Linear(C, config.d_ff, bias=False) for n in ("gate", "up")}
            | {"output": nn.Linear(config.d_ff, C, bias=False)}
        )

    def forward(self, x_BTC: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        h_BTC = self.attention_norm(x_BTC)
        q, k, v = (
            self.attention[n](h_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        q, k = rotated(q, cos_TF, sin_TF), rotated(k, cos_TF, sin_TF)
        out_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.attention["output"](out_BHTD.transpose(1, 2).flatten(2))
        h_BTC = self.feed_forward_norm(x_BTC)
        inner = F.silu(self.feed_forward["gate"](h_BTC)) * self.feed_forward["up"](h_BTC)
        return x_BTC + self.feed_forward["output"](inner)


def rotated(x_BHTD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    a, b = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat([a * cos_TF - b * sin_TF, b * cos_TF + a * sin_TF], dim=-1).to(x_BHTD.dtype)


class PlainDecoder(nn.Module):
    def __init__(self, config, vocab_size: int, context: int):
        super().__init__()
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.embedding = nn.Embedding(padded, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = nn.Linear(config.d_model, padded, bias=False)
        D = config.resolved_head_dim
        angle = torch.arange(context)[:, None] / config.rope_base ** (
            torch.arange(D // 2) / (D // 2)
        )
        self.register_buffer("cos_TF", angle.cos(), persistent=False)
        self.register_buffer("sin_TF", angle.sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, self.cos_TF, self.sin_TF)
        logits_BTV = self.unembedding(self.norm(x_BTC))
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="sum"
        )
