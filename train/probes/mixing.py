"""Over-mixing: how far information spreads and how alike positions become (arXiv 2504.02732).

The paper's claim is that a sink keeps a model from mixing too much: attention that rests on the
first token moves no information. Its released figures, not its code, are what this follows.

Perturbation map. One token of the text is changed to another prompt's token at the same place
(``CHANGED``, counted in text, so one position later after a BOS):

    perturbation           mean over prompts of ||h_orig - h_pert||_2, by layer and position
    perturbation_relative  the same with each difference over ||h_orig||_2

after layer l, on ``text`` and ``bos_text``. Positions before the change see nothing of it and are
left out.

Jacobian. With h^0 the embedded tokens and h^L the stream after the last block, on the first 16
tokens of a prompt, by position i, j the last position (the left side of the paper's Theorem 3.2):

    jacobian_norm          mean over prompts of ||d h^L_j / d h^0_i||_F; an identity has sqrt(C)

exact, by reverse mode through the blocks with the reference attention, on the natural prompts.
A slot's own stream (a sink token's) counts as constant.

Collapse, by layer, on every prompt input; X the states of a prompt's positions, x their mean:

    rank_collapse          mean of ||X - 1 x^T||_F / ||X||_F: 0 where all positions are alike
    rank_collapse_later    the same without position 0, whose norm would drown the others
    late_cosine            mean cosine of pairs of different positions in the prompt's second half

The perturbation and the collapse names end in ``_hidden_first`` on the natural prompts with key 0
hidden from every later query in every layer, its token still there: what the sink does, without the
surprise of a missing BOS. A slot stays visible.

Cost: the maps and the collapse on the first 16 prompts, a forward pass for each input and one more
for each map (with four inputs and a BOS, 8 x 1024 tokens); the Jacobian on the first 2, C forward
and backward passes over 16 tokens each. 1.2 s of one core for the CPU preset.

Axes: B rows, T positions, C width of the residual stream, N copies of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.masks import IntervalMask
from models.batch import PackedBatch
from models.decoder import Decoder
from models.norms import at_least_fp32
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import Trace, cut, everywhere, hide_first, norms_BT, trace

ROWS = 16
"""Prompts of each input, but for the Jacobian."""

CHANGED = 3
"""Index of the text token that is changed."""

JACOBIAN_ROWS = 2
"""Prompts whose Jacobians are taken."""

JACOBIAN_TOKENS = 16
"""Tokens of each of them."""

JACOBIAN_COPIES = 128
"""Rows of a Jacobian that one backward pass gives, which bounds the memory."""


def probe_mixing(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """Perturbation maps, Jacobian norms and collapse (see the module's docstring)."""
    natural = inputs.natural()
    hidden = everywhere(decoder, mask=hide_first)
    for name, prompts in inputs.prompts.items():
        batch = cut(prompts, ROWS)
        position = {"text": CHANGED, "bos_text": CHANGED + 1}.get(name)
        for ending, overrides in (("", None), ("_hidden_first", hidden)):
            if overrides is not None and name != natural:
                continue
            clean = trace(decoder, batch, overrides)
            findings = list(collapse(clean, name))
            if position is not None:
                moved = trace(decoder, with_other_token(batch, position), overrides)
                findings += perturbation(clean, moved, name, position)
            yield from (f._replace(name=f.name + ending) for f in findings)
    rows = cut(inputs.prompts[natural], JACOBIAN_ROWS, JACOBIAN_TOKENS)
    for position, norm in enumerate(jacobian_norm_T(decoder, rows).tolist()):
        yield Finding("jacobian_norm", natural, norm, position=position)


def with_other_token(batch: PackedBatch, position: int) -> PackedBatch:
    """The prompts with the token at ``position`` changed to the next prompt's that differs there.

    Prompts that are all alike there get the token id below theirs, or 1 for 0.
    """
    token_B = batch.tokens_BT[:, position]
    row_B = torch.arange(len(token_B), device=token_B.device)
    other_BN = token_B[(row_B[:, None] + row_B) % len(token_B)]
    differs_BN = other_BN != token_B[:, None]
    # argmax takes the first of equals.
    nearest_B = differs_BN.int().argmax(1, keepdim=True)
    below_B = torch.where(token_B > 0, token_B - 1, token_B + 1)
    changed_BT = batch.tokens_BT.clone()
    changed_BT[:, position] = torch.where(
        differs_BN.any(1), other_BN.gather(1, nearest_B).squeeze(1), below_B
    )
    return dataclasses.replace(batch, tokens_BT=changed_BT)


def perturbation(clean: Trace, moved: Trace, name: str, position: int) -> Iterator[Finding]:
    """The perturbation map of a change at ``position``, from there on."""
    states = zip(clean.hidden_BTC[1:], moved.hidden_BTC[1:], strict=True)
    for layer, (clean_BTC, moved_BTC) in enumerate(states):
        change_BT = norms_BT(moved_BTC - clean_BTC)
        values = {
            "perturbation": change_BT.mean(0),
            "perturbation_relative": _ratio(change_BT, norms_BT(clean_BTC)).mean(0),
        }
        for kind, value_T in values.items():
            for later, value in enumerate(value_T[position:].tolist()):
                yield Finding(kind, name, value, layer=layer, position=position + later)


def collapse(clean: Trace, name: str) -> Iterator[Finding]:
    """Distance to the best constant approximation, and cosine of late positions, by layer."""
    for layer, hidden_BTC in enumerate(clean.hidden_BTC[1:]):
        hidden_BTC = at_least_fp32(hidden_BTC)
        values = {
            "rank_collapse": distance_to_constant_B(hidden_BTC),
            "rank_collapse_later": distance_to_constant_B(hidden_BTC[:, 1:]),
            "late_cosine": pairwise_cosine(hidden_BTC[:, hidden_BTC.shape[1] // 2 :]),
        }
        for kind, value_B in values.items():
            yield Finding(kind, name, value_B.mean().item(), layer=layer)


def distance_to_constant_B(hidden_BTC: Tensor) -> Tensor:
    """||X - 1 x^T||_F / ||X||_F of each row's positions, x their mean; between 0 and 1."""
    rest_BTC = hidden_BTC - hidden_BTC.mean(1, keepdim=True)
    return _ratio(torch.linalg.matrix_norm(rest_BTC), torch.linalg.matrix_norm(hidden_BTC))


def pairwise_cosine(x_BTC: Tensor) -> Tensor:
    """Mean cosine of all pairs of different positions T of each row, [B]; 0 of zero vectors."""
    direction_BTC = _ratio(x_BTC, torch.linalg.vector_norm(x_BTC, dim=-1, keepdim=True))
    length = x_BTC.shape[1]
    # |sum of u|^2 holds every pair twice, and each u with itself.
    pairs_B = direction_BTC.sum(1).square().sum(-1) - direction_BTC.square().sum((1, 2))
    return pairs_B / (length * (length - 1))


def jacobian_norm_T(decoder: Decoder, batch: PackedBatch) -> Tensor:
    """||d h^L_j / d h^0_i||_F by i, j the last position; mean over the rows.

    A row goes through the blocks as many copies, the gradient of each that of another dimension of
    h^L_j: one backward pass gives as many rows of the Jacobian, in any kind of attention.
    """
    embedded_BTC = trace(decoder, batch).hidden_BTC[0]
    last, width = len(decoder.blocks) - 1, embedded_BTC.shape[-1]
    square_BT = torch.zeros_like(at_least_fp32(embedded_BTC[..., 0]))
    for row, hidden_TC in enumerate(embedded_BTC):
        for start in range(0, width, JACOBIAN_COPIES):
            copies = min(JACOBIAN_COPIES, width - start)
            seen = []
            overrides = everywhere(decoder)
            overrides[last].output = lambda x_NTC, seen=seen: seen.append(x_NTC[:, -1]) or x_NTC
            # Lightning validates in inference mode.
            with torch.inference_mode(False), torch.enable_grad():
                hidden_NTC = hidden_TC.repeat(copies, 1, 1).requires_grad_()
                overrides[0].input = hidden_NTC
                decoder(_copies(batch, row, copies), overrides, statistics="off")
                chosen_N = seen[0].diagonal(start)[:copies]
                (gradient_NTC,) = torch.autograd.grad(chosen_N.sum(), hidden_NTC)
            square_BT[row] += at_least_fp32(gradient_NTC).square().sum((0, 2))
    return square_BT.sqrt().mean(0)


def _copies(batch: PackedBatch, row: int, copies: int) -> PackedBatch:
    """A causal batch of one row over and over, tokens and positions alone."""
    tokens_NT = batch.tokens_BT[row].repeat(copies, 1)
    return dataclasses.replace(
        batch,
        tokens_BT=tokens_NT,
        positions_BT=batch.positions_BT[row].repeat(copies, 1),
        mask=IntervalMask.causal(*tokens_NT.shape).to(tokens_NT.device),
    )


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where both are."""
    return above / below.clamp(min=torch.finfo(below.dtype).tiny)
