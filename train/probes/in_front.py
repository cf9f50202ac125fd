"""What a token in front of a text costs, by the token: is it the BOS that a model minds, or any?

Nats a label on 64-token prompts, on the labels of ``losses`` (text tokens 2 to 63): the loss of the
first 63 tokens of ``text`` with a token in front, less that of ``text`` (input ``text``):

    cost_bos, cost_eos    with the BOS, which is -``cost_without_bos`` of ``losses``; with the EOS
                          where it is another
    cost_token            with a token of text: mean over up to 16 distinct ids of those that occur
                          in the prompts, each as likely, each in front of every prompt
    cost_token_deviation  standard deviation over those ids (n - 1); not given for one
    cost_token_least, cost_token_most
    cheaper_token_share   share of those ids that cost less than the BOS

Below 0 a model predicts better with the token than without. ``cheaper_token_share`` is about 1/2
where the BOS is a token like any other, near 0 where it is cheaper than all, near 1 where dearer.

A model that never saw the BOS may mind it for what it is, or as it minds any token that says
nothing of the text behind it: then ``cost_bos`` lies among the costs of tokens of text.
(arXiv 2504.02732, table 2, has such a model with its BOS and without.)

Cost: 19 forward passes of the prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder
from train.probes.base import Finding, ProbeInputs

TOKENS = 16
"""Tokens of text that are tried in front, at most."""

SEED = 2504_02732
"""Of the draw of those tokens."""


@torch.no_grad()
def probe_in_front(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module; nothing where there is no BOS."""
    if "bos_text" not in inputs.prompts:
        return
    text, shifted = inputs.prompts["text"], inputs.prompts["bos_text"]
    without = _loss(decoder, text)

    def cost(token: Tensor) -> float:
        tokens_BT = shifted.tokens_BT.clone()
        tokens_BT[:, 0] = token
        return _loss(decoder, dataclasses.replace(shifted, tokens_BT=tokens_BT)) - without

    found = {"cost_bos": cost(shifted.tokens_BT[0, 0])}
    if "eos_text" in inputs.prompts:
        found["cost_eos"] = cost(inputs.prompts["eos_text"].tokens_BT[0, 0])
    known = text.tokens_BT.unique()
    costs = [cost(token) for token in known[_drawn(len(known)).to(known.device)]]
    cost_N = torch.tensor(costs, dtype=torch.float64)
    found["cost_token"] = cost_N.mean().item()
    if len(costs) > 1:
        found["cost_token_deviation"] = cost_N.std(correction=1).item()
    found["cost_token_least"] = min(costs)
    found["cost_token_most"] = max(costs)
    found["cheaper_token_share"] = (cost_N < found["cost_bos"]).double().mean().item()
    for name, value in found.items():
        yield Finding(name, "text", value)


def _drawn(num_tokens: int) -> Tensor:
    """Which of so many tokens are tried, the same every time."""
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(SEED))[:TOKENS]


def _loss(decoder: Decoder, batch: PackedBatch) -> float:
    """Nats a label."""
    num_labels = int((batch.labels_BT != IGNORE_LABEL).sum())
    return decoder.loss(batch, statistics="off").loss.item() / num_labels
