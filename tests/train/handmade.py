"""Decoders whose weights are set by hand, so that what a probe finds can be worked out on paper.

Norms are taken out, there is no position encoding, and everything is fp64.

Axes: B rows, T positions, C width of the residual stream, N samples of a row's positions.
"""

import torch
from torch import Tensor, nn

from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder, DecoderConfig
from train.probes.base import Finding, ProbeInputs

LENGTH = 16
"""Tokens of a prompt, and ids there are: a prompt can hold each once."""

MARKER = 10.0
"""What ``planted_sink`` writes where a token saw itself alone."""


def prompts_of(tokens_BT: Tensor) -> PackedBatch:
    """Causal prompts of one document each, without labels."""
    document_BT = torch.ones_like(tokens_BT, dtype=torch.int32)
    return PackedBatch(
        tokens_BT=tokens_BT,
        labels_BT=torch.full_like(tokens_BT, IGNORE_LABEL),
        positions_BT=torch.arange(tokens_BT.shape[1]).repeat(len(tokens_BT), 1),
        document_BT=document_BT,
        begins_BT=document_BT > 0,
        mask=IntervalMask.causal(*tokens_BT.shape),
        num_labels=torch.tensor(0),
    )


def inputs_of(trained_with_bos: bool = False, **tokens_BT: Tensor) -> ProbeInputs:
    """Prompts by input name."""
    return ProbeInputs(
        prompts={name: prompts_of(tokens) for name, tokens in tokens_BT.items()},
        context=[],
        token_class_V=torch.zeros(LENGTH, dtype=torch.int64),
        trained_with_bos=trained_with_bos,
    )


def shifted_tokens(rows: int = LENGTH) -> Tensor:
    """Prompts that hold each id once and begin with a different one: ids r, r + 1, ..."""
    return (torch.arange(rows)[:, None] + torch.arange(LENGTH)) % LENGTH


def shuffled_tokens(rows: int) -> Tensor:
    """Prompts that hold each id once, in any order."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(rows)])


def blank_decoder(*, d_model: int = LENGTH, num_layers: int = 3, attention=None) -> Decoder:
    """One head a layer, embeddings of one-hot ids, every other weight 0: blocks add nothing.

    Zero queries attend uniformly to what they see.
    """
    config = DecoderConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=1,
        head_dim=LENGTH,
        d_ff=LENGTH,
        position="none",
        feed_forward="relu",
        vocab_multiple=1,
    )
    decoder = Decoder(config, attention or SoftmaxAttention.Config(), LENGTH).double().eval()
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    for block in decoder.blocks:
        block.attention_norm = block.feed_forward_norm = nn.Identity()
    decoder.norm = nn.Identity()
    set_weight(decoder.embedding, torch.eye(LENGTH, d_model))
    return decoder


def mixing_decoder(strength: float) -> Decoder:
    """h_i <- h_i + strength * mean_{j <= i} h_j in each layer: linear, the same in every C."""
    decoder = blank_decoder()
    for block in decoder.blocks:
        set_weight(block.attention.value, torch.eye(LENGTH))
        set_weight(block.attention.output, strength * torch.eye(LENGTH))
    return decoder


def planted_sink(writer: int = 0, least: float = 0.75) -> Decoder:
    """What sees itself alone in block ``writer`` gets a marker, and later heads rest on markers.

    The stream has a token's one-hot id, a 1, the mean of the one-hot ids that block ``writer`` saw,
    and the marker: ``MARKER`` where the mean is of one token, and where it is of n it is MARKER n
    (1 / n - least) / (1 - least) or 0: with ``least`` = 0.4 position 1 has a third of it. Heads
    before attend uniformly, those after score the full marker 20.
    """
    one, seen, marker = LENGTH, LENGTH + 1, 2 * LENGTH + 1
    decoder = blank_decoder(d_model=2 * LENGTH + 2)
    embedding_VC = decoder.embedding.weight.detach().clone()
    embedding_VC[:, one] = 1
    set_weight(decoder.embedding, embedding_VC)

    writing = decoder.blocks[writer]
    set_weight(writing.attention.value, torch.eye(LENGTH, 2 * LENGTH + 2))
    set_weight(writing.attention.output, torch.eye(2 * LENGTH + 2, LENGTH).roll(seen, 0))
    # relu(share of id j among those seen - least): 1 - least for the only one seen.
    above_FC = torch.eye(LENGTH, 2 * LENGTH + 2).roll(seen, 1)
    above_FC[:, one] = -least
    set_weight(writing.feed_forward.up, above_FC)
    to_marker_CF = torch.zeros(2 * LENGTH + 2, LENGTH)
    to_marker_CF[marker] = MARKER / (1 - least)
    set_weight(writing.feed_forward.output, to_marker_CF)

    query_DC, key_DC = torch.zeros(2, LENGTH, 2 * LENGTH + 2)
    query_DC[0, one] = 20 * LENGTH**0.5 / MARKER
    key_DC[0, marker] = 1
    for block in decoder.blocks[writer + 1 :]:
        set_weight(block.attention.query, query_DC)
        set_weight(block.attention.key, key_DC)
    return decoder


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear layer or an embedding that weight."""
    assert module.weight.shape == weight.shape
    module.weight.data.copy_(weight)


def values(findings: list[Finding], name: str, **where: object) -> list[float]:
    """Values of the findings of that name and place, in the order they came."""
    found = [
        f.value
        for f in findings
        if f.name == name and all(getattr(f, key) == value for key, value in where.items())
    ]
    assert found, f"no {name} at {where}"
    return found


def value(findings: list[Finding], name: str, **where: object) -> float:
    """The value of the only finding of that name and place."""
    (found,) = values(findings, name, **where)
    return found
