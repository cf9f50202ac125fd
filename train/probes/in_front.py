"""What a token in front of a text costs, by the token: does a model mind the BOS, or any token?

Nats a label on 64-token prompts, on the labels of ``losses`` (text tokens 2 to 63): the loss of the
first 63 tokens of ``text`` with a token in front, less that of ``text`` (input ``text``):

    cost_bos, cost_eos    that token is the BOS, or the EOS where it is another
    cost_token            any token of text: mean over 24 of those that occur in the prompts, drawn
                          alike, each in front of every prompt
    cost_token_deviation  standard deviation over the 24
    cost_token_least, cost_token_most
    cheaper_tokens        share of the 24 that cost less than the BOS

    cosine_bos            cosine of the BOS's embedding with the mean of those of the tokens that
                          occur: tied to the unembedding, an embedding that is never the answer is
                          trained away from what the model says, seen or not
    norm_bos              norm of the BOS's embedding over the mean norm of theirs

In arXiv 2504.02732, table 2, a model that was trained without a BOS has 2.69 nats with one and 2.70
without. On short prompts a token in front that says nothing of the text behind it can cost more
than that, whichever it is; what a BOS costs beyond that is the BOS's.

Cost: 27 forward passes of the first 48 prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder
from models.norms import at_least_fp32
from train.probes.base import Finding, ProbeInputs
from train.probes.inputs import SEED
from train.probes.trace import cut

TOKENS = 24
"""Tokens of text that are tried in front."""

PROMPTS = 48
"""Prompts that they are put in front of."""


@torch.no_grad()
def probe_in_front(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module; nothing where there is no BOS."""
    if "bos_text" not in inputs.prompts:
        return
    shifted, text = (cut(inputs.prompts[name], PROMPTS) for name in ("bos_text", "text"))
    bos = shifted.tokens_BT[0, 0]
    without = _loss(decoder, text)

    def cost(token: Tensor) -> float:
        tokens_BT = shifted.tokens_BT.clone()
        tokens_BT[:, 0] = token
        return _loss(decoder, dataclasses.replace(shifted, tokens_BT=tokens_BT)) - without

    of_bos = cost(bos)
    found = {"cost_bos": of_bos}
    if "eos_text" in inputs.prompts:
        found["cost_eos"] = cost(inputs.prompts["eos_text"].tokens_BT[0, 0])
    known_V = text.tokens_BT.unique()
    of_token = torch.tensor([cost(token) for token in known_V[_drawn(len(known_V))]])
    embedding_VC = at_least_fp32(decoder.embedding.weight)
    known_VC = embedding_VC[known_V]
    found |= {
        "cost_token": of_token.mean().item(),
        "cost_token_deviation": of_token.std(correction=1).item() if len(of_token) > 1 else 0.0,
        "cost_token_least": of_token.min().item(),
        "cost_token_most": of_token.max().item(),
        "cheaper_tokens": (of_token < of_bos).double().mean().item(),
        "cosine_bos": torch.cosine_similarity(embedding_VC[bos], known_VC.mean(0), 0).item(),
        "norm_bos": (embedding_VC[bos].norm() / known_VC.norm(dim=1).mean()).item(),
    }
    for name, value in found.items():
        yield Finding(name, "text", value)


def _drawn(num_tokens: int) -> Tensor:
    """Indices of the tokens that are tried, the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randperm(num_tokens, generator=generator)[:TOKENS]


def _loss(decoder: Decoder, batch: PackedBatch) -> float:
    num_labels = int((batch.labels_BT != IGNORE_LABEL).sum())
    return decoder.loss(batch, statistics="off").loss.item() / num_labels
