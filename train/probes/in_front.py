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

and with the BOS under another embedding of the same length:

    cost_noise            Gaussian noise: mean over 16 draws; cost_noise_deviation, _least, _most
                          over the draws as above
    cost_shared           m, the mean of the embeddings of the ids that occur in the prompts
    bos_cosine            of the BOS's own embedding and m
    bos_length            its l2 norm over the mean norm of those ids' embeddings

Below 0 a model predicts better with the token than without. ``cheaper_token_share`` is about 1/2
where the BOS is a token like any other, near 0 where it is cheaper than all, near 1 where dearer.

A model that never saw the BOS may mind it for what it is, or as it minds any token that says
nothing of the text behind it: then ``cost_bos`` lies among the costs of tokens of text. What it is
to such a model is its embedding alone. Tied, that is also the BOS's row of the unembedding, which
is trained never to be the answer, and ``bos_cosine`` tells how far it is what other rows have in
common. Noise may cost less than tokens of text do too, so compare it with both.
(arXiv 2504.02732, table 2, has such a model with its BOS and without.)

Axes: B rows, T positions, C width of the residual stream, K ids of the text, N draws of noise.

Cost: 36 forward passes of the prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder
from train.probes.base import Finding, ProbeInputs

TOKENS = 16
"""Tokens of text that are tried in front, at most."""

DRAWS = 16
"""Of noise."""

SEED = 2504_02732
"""Of the draw of those tokens, and of the noise."""


@torch.no_grad()
def probe_in_front(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module; nothing where there is no BOS."""
    if "bos_text" not in inputs.prompts:
        return
    text, shifted = inputs.prompts["text"], inputs.prompts["bos_text"]
    without, text_BTC = _loss(decoder, text)

    def cost(token: Tensor) -> float:
        tokens_BT = shifted.tokens_BT.clone()
        tokens_BT[:, 0] = token
        return _loss(decoder, dataclasses.replace(shifted, tokens_BT=tokens_BT))[0] - without

    with_bos, shifted_BTC = _loss(decoder, shifted)
    found = {"cost_bos": with_bos - without}
    if "eos_text" in inputs.prompts:
        found["cost_eos"] = cost(inputs.prompts["eos_text"].tokens_BT[0, 0])
    ids_K, index_BT = text.tokens_BT.unique(return_inverse=True)
    costs = [cost(token) for token in ids_K[_drawn(len(ids_K)).to(ids_K.device)]]
    found |= _spread("cost_token", costs)
    found["cheaper_token_share"] = sum(one < found["cost_bos"] for one in costs) / len(costs)

    bos_C = shifted_BTC[0, 0]
    embedded_KC = bos_C.new_zeros(len(ids_K), len(bos_C))
    embedded_KC[index_BT.flatten()] = text_BTC.flatten(0, 1)
    shared_C = embedded_KC.mean(dim=0)

    def cost_as(direction_C: Tensor) -> float:
        first_C = direction_C / direction_C.norm() * bos_C.norm()
        return _loss(decoder, shifted, first_C)[0] - without

    found |= _spread("cost_noise", [cost_as(noise_C) for noise_C in _noise(bos_C)])
    found["cost_shared"] = cost_as(shared_C)
    found["bos_cosine"] = torch.cosine_similarity(bos_C, shared_C, dim=0).item()
    found["bos_length"] = (bos_C.norm() / embedded_KC.norm(dim=1).mean()).item()
    for name, value in found.items():
        yield Finding(name, "text", value)


def _drawn(num_tokens: int) -> Tensor:
    """Which of so many tokens are tried, the same every time."""
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(SEED))[:TOKENS]


def _noise(like_C: Tensor) -> Tensor:
    """[DRAWS, C], the same every time and on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(DRAWS, len(like_C), generator=generator).to(like_C)


def _spread(name: str, costs: list[float]) -> dict[str, float]:
    """Mean, deviation and extremes, by the names of findings."""
    values = torch.tensor(costs, dtype=torch.float64)
    found = {name: values.mean().item()}
    if len(costs) > 1:
        found[f"{name}_deviation"] = values.std(correction=1).item()
    return found | {f"{name}_least": min(costs), f"{name}_most": max(costs)}


def _loss(
    decoder: Decoder, batch: PackedBatch, first_C: Tensor | None = None
) -> tuple[float, Tensor]:
    """Nats a label, and the embedded tokens [B, T, C]; first_C: taken for position 0's.

    Through a hook: writing into the weight would change a tied unembedding too, and a weight that
    is sharded over devices isn't whole outside a forward pass.
    """
    kept = []

    def replaced(module: nn.Module, arguments: tuple, embedded_BTC: Tensor) -> Tensor:
        if first_C is not None:
            embedded_BTC = embedded_BTC.clone()
            embedded_BTC[:, 0] = first_C
        kept.append(embedded_BTC)
        return embedded_BTC

    hook = decoder.embedding.register_forward_hook(replaced)
    try:
        loss = decoder.loss(batch, statistics="off").loss.item()
    finally:
        hook.remove()
    return loss / int((batch.labels_BT != IGNORE_LABEL).sum()), kept[0]
