"""What the sink looks like from inside: norms, massive activations, angles, entropy.

On 64-token prompts with and without BOS, means over prompts; layers count from 0, and hidden states
are those after the block, the embedding's having names that end in ``_embedding``
(arXiv 2410.10781):

    hidden_ratio          ||h_0|| / mean_{t > 0} ||h_t||, by layer
    key_ratio             the same of each head's keys, by layer and key head
    value_ratio           the same of its values: a sink's key and value are small
    largest_over_median   max |h| / median |h| over all entries of a prompt's hidden states
    kurtosis              excess kurtosis of those entries, 0 for a normal distribution
    cosine_first          mean over queries i > 0 that see key 0 of cos(q_i, k_0), by layer and head
    cosine_others         mean over pairs 0 < j <= i that see each other of cos(q_i, k_j)
    product_first         mean over the same queries of ||q_i|| ||k_0||
    product_others        mean over the same pairs of ||q_i|| ||k_j||: a sink comes from the angle
                          rather than from the norms
    entropy_share         mean over queries that see two keys or more of the entropy of their
                          attention over log of how many they see, a slot left out: 1 for a head
                          that attends uniformly; queries that weigh no key (proxies) don't count

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
from train.probes.trace import cut, lower_median, norms_BT, trace

PROMPTS = 32
"""Prompts that are looked at: norms vary little among them."""


def probe_norms(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    for name in ("text", "bos_text"):
        if name not in inputs.prompts:
            continue
        batch = cut(inputs.prompts[name], PROMPTS)
        seen = trace(decoder, batch)
        masks = decoder.layer_masks(batch.mask)
        embedded_BTC, *after = seen.hidden_BTC
        for what, value in _of_hidden(embedded_BTC).items():
            yield Finding(f"{what}_embedding", name, value)
        for layer, hidden_BTC in enumerate(after):
            for what, value in _of_hidden(hidden_BTC).items():
                yield Finding(what, name, value, layer)
        for layer, mask in enumerate(masks):
            visible_BTS = mask.dense_BTS()
            heads = {
                "key_ratio": _ratio_G(seen.k_BTGD[layer]),
                "value_ratio": _ratio_G(seen.v_BTGE[layer]),
                **_angles_H(seen.q_BTHD[layer], seen.k_BTGD[layer], visible_BTS),
                "entropy_share": _entropy_share_H(seen.probabilities_BHTS[layer], visible_BTS),
            }
            for what, value_H in heads.items():
                for head, value in enumerate(value_H.tolist()):
                    yield Finding(what, name, value, layer, head)


def _of_hidden(hidden_BTC: Tensor) -> dict[str, float]:
    x_BX = at_least_fp32(hidden_BTC).flatten(1).double()
    size_BX = x_BX.abs()
    centred_BX = x_BX - x_BX.mean(1, keepdim=True)
    variance_B = centred_BX.square().mean(1)
    kurtosis_B = centred_BX.pow(4).mean(1) / _positive(variance_B.square()) - 3
    largest_B = size_BX.amax(1) / _positive(lower_median(size_BX))
    return {
        "hidden_ratio": _first_over_others(norms_BT(hidden_BTC)).mean().item(),
        "largest_over_median": largest_B.mean().item(),
        "kurtosis": kurtosis_B.mean().item(),
    }


def _ratio_G(x_BTGD: Tensor) -> Tensor:
    norm_BTG = torch.linalg.vector_norm(at_least_fp32(x_BTGD), dim=-1)
    return _first_over_others(norm_BTG).mean(0)


def _first_over_others(norm_BTx: Tensor) -> Tensor:
    return norm_BTx[:, 0] / _positive(norm_BTx[:, 1:].mean(1))


def _positive(x: Tensor) -> Tensor:
    """``x``, but not 0, so that what is 0 / 0 is 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _angles_H(q_BTHD: Tensor, k_BTGD: Tensor, visible_BTS: Tensor) -> dict[str, Tensor]:
    q_BTHD = at_least_fp32(q_BTHD)
    k_BSHD = at_least_fp32(k_BTGD).repeat_interleave(q_BTHD.shape[2] // k_BTGD.shape[2], dim=2)
    q_norm_BTH, k_norm_BSH = (torch.linalg.vector_norm(x, dim=-1) for x in (q_BTHD, k_BSHD))
    dot_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD)
    product_BHTS = torch.einsum("bth,bsh->bhts", q_norm_BTH, k_norm_BSH)
    values = {"cosine": dot_BHTS / _positive(product_BHTS), "product": product_BHTS}
    first_BTS = visible_BTS.clone()
    first_BTS[:, 0] = False
    first_BTS[..., 1:] = False
    others_BTS = visible_BTS.clone()
    others_BTS[..., 0] = False
    return {
        f"{what}_{which}": _mean_over(value_BHTS, pairs_BTS)
        for what, value_BHTS in values.items()
        for which, pairs_BTS in (("first", first_BTS), ("others", others_BTS))
        # A window of one token leaves no pairs.
        if pairs_BTS.any()
    }


def _mean_over(value_BHTS: Tensor, pairs_BTS: Tensor) -> Tensor:
    return (value_BHTS * pairs_BTS[:, None]).sum((0, 2, 3)) / pairs_BTS.sum()


def _entropy_share_H(probabilities_BHTS: Tensor, visible_BTS: Tensor) -> Tensor:
    """Of the distribution over keys; rows that sum to less (a slot, a proxy) are scaled to 1."""
    weights_BHTS = probabilities_BHTS.abs()
    total_BHT1 = weights_BHTS.sum(-1, keepdim=True)
    entropy_BHT = torch.special.entr(weights_BHTS / _positive(total_BHT1)).sum(-1)
    keys_BT = visible_BTS.sum(-1)
    limit_BT = keys_BT.clamp(min=2).to(entropy_BHT.dtype).log()
    counts_BHT = (keys_BT[:, None] >= 2) & (total_BHT1[..., 0] > 0)
    share_BHT = torch.where(counts_BHT, entropy_BHT / limit_BT[:, None], 0.0)
    return share_BHT.sum((0, 2)) / counts_BHT.sum((0, 2)).clamp(min=1)
