"""What the sink looks like from inside: norms, massive activations, angles, entropy.

On 64-token prompts with and without BOS, means over prompts; layers count from 0, and hidden states
are those after the block, the embedding's having names that end in ``_embedding``
(arXiv 2410.10781):

    hidden_ratio          ||h_0|| / mean_{t > 0} ||h_t||, by layer
    key_ratio             the same of each head's keys, by layer and key head
    value_ratio           the same of its values: a sink's key and value are small
    largest_over_median   max |h| / median |h| over all entries of a prompt's hidden states
    kurtosis              excess kurtosis of those entries, 0 for a normal distribution
    cosine_first          mean over queries i > 0 of cos(q_i, k_0), by layer and query head
    cosine_others         mean over pairs 0 < j <= i of cos(q_i, k_j)
    product_first         mean over queries i > 0 of ||q_i|| ||k_0||
    product_others        mean over pairs 0 < j <= i of ||q_i|| ||k_j||: a sink comes from the angle
                          rather than from the norms
    entropy_share         mean over queries i > 0 of the entropy of their attention over
                          log(i + 1), a slot left out: 1 for a head that attends uniformly

Cost: one forward pass of each of the two inputs, through the reference attention, on the first 32
prompts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.decoder import Decoder
from models.norms import at_least_fp32
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import cut, norms_BT, trace

PROMPTS = 32
"""Prompts that are looked at: norms vary little among them."""


def probe_norms(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    for name in ("text", "bos_text"):
        if name not in inputs.prompts:
            continue
        seen = trace(decoder, cut(inputs.prompts[name], PROMPTS))
        embedded_BTC, *after = seen.hidden_BTC
        for what, value in _of_hidden(embedded_BTC).items():
            yield Finding(f"{what}_embedding", name, value)
        for layer, hidden_BTC in enumerate(after):
            for what, value in _of_hidden(hidden_BTC).items():
                yield Finding(what, name, value, layer)
        for layer in range(len(decoder.blocks)):
            heads = {
                "key_ratio": _ratio_G(seen.k_BTGD[layer]),
                "value_ratio": _ratio_G(seen.v_BTGE[layer]),
                **_angles_H(seen.q_BTHD[layer], seen.k_BTGD[layer]),
                "entropy_share": _entropy_share_H(seen.probabilities_BHTS[layer]),
            }
            for what, value_H in heads.items():
                for head, value in enumerate(value_H.tolist()):
                    yield Finding(what, name, value, layer, head)


def _of_hidden(hidden_BTC: Tensor) -> dict[str, float]:
    norm_BT = norms_BT(hidden_BTC)
    x_BX = at_least_fp32(hidden_BTC).flatten(1).double()
    size_BX = x_BX.abs()
    centred_BX = x_BX - x_BX.mean(1, keepdim=True)
    variance_B = centred_BX.square().mean(1)
    kurtosis_B = centred_BX.pow(4).mean(1) / variance_B.square() - 3
    return {
        "hidden_ratio": (norm_BT[:, 0] / norm_BT[:, 1:].mean(1)).mean().item(),
        "largest_over_median": (size_BX.amax(1) / size_BX.median(1).values).mean().item(),
        "kurtosis": kurtosis_B.mean().item(),
    }


def _ratio_G(x_BTGD: Tensor) -> Tensor:
    norm_BTG = torch.linalg.vector_norm(at_least_fp32(x_BTGD), dim=-1)
    return (norm_BTG[:, 0] / norm_BTG[:, 1:].mean(1)).mean(0)


def _angles_H(q_BTHD: Tensor, k_BTGD: Tensor) -> dict[str, Tensor]:
    q_BTHD = at_least_fp32(q_BTHD)
    k_BSHD = at_least_fp32(k_BTGD).repeat_interleave(q_BTHD.shape[2] // k_BTGD.shape[2], dim=2)
    q_norm_BTH, k_norm_BSH = (torch.linalg.vector_norm(x, dim=-1) for x in (q_BTHD, k_BSHD))
    dot_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD)
    product_BHTS = torch.einsum("bth,bsh->bhts", q_norm_BTH, k_norm_BSH)
    cosine_BHTS = dot_BHTS / product_BHTS.clamp(min=torch.finfo(dot_BHTS.dtype).tiny)
    length = q_BTHD.shape[1]
    pairs_TS = torch.ones(length, length, dtype=torch.bool, device=q_BTHD.device).tril()
    pairs_TS[:, 0] = False
    return {
        "cosine_first": cosine_BHTS[:, :, 1:, 0].mean((0, 2)),
        "cosine_others": cosine_BHTS[..., pairs_TS].mean((0, 2)),
        "product_first": product_BHTS[:, :, 1:, 0].mean((0, 2)),
        "product_others": product_BHTS[..., pairs_TS].mean((0, 2)),
    }


def _entropy_share_H(probabilities_BHTS: Tensor) -> Tensor:
    """Of the distribution over keys; rows that sum to less (a slot, a proxy) are scaled to 1."""
    weights_BHTS = probabilities_BHTS.abs()
    total_BHT1 = weights_BHTS.sum(-1, keepdim=True)
    p_BHTS = weights_BHTS / total_BHT1.clamp(min=torch.finfo(weights_BHTS.dtype).tiny)
    entropy_BHT = torch.special.entr(p_BHTS).sum(-1)
    length = p_BHTS.shape[-1]
    limit_T = torch.arange(1, length + 1, device=p_BHTS.device, dtype=p_BHTS.dtype).log()
    return (entropy_BHT[..., 1:] / limit_T[1:]).mean((0, 2))
