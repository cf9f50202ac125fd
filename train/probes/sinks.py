"""Where attention goes: sink masses and rates, and which kind of token gets them.

alpha_k of a head is the mean attention that key k gets from the queries that see it, itself
included (arXiv 2410.10781; ``train.metrics``). On every input, 64-token prompts and rows at the
run's context (there ``row_`` is the first key over the whole row, ``document_`` the first tokens of
documents):

    mass, baseline, excess                    by layer and head, and of the model
    rate_020 ... rate_080                     threshold each sample, then average
    rate_020_of_means ... rate_080_of_means   average, then threshold (of the model only)

of the first key, of a slot (``null_...``), of the first key without the slot (``of_keys_...``), and
of the next 15 keys at their ``position``.

The best key of a sample and head is the one with the largest alpha among the first half of the
prompt, all of which at least half of its queries see:

    best_alpha            mean of its alpha
    best_is_first         share of samples in which it is key 0
    best_rate_030_<C>     share of samples in which its alpha is > 0.3 and its token of class C
                          (``TokenClass``: bos, eos, delimiter, other)

Cost: one forward pass of each input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder, DecoderOutput
from train.metrics import HORIZON, SinkTotals
from train.probes.base import Finding, ProbeInputs
from train.probes.inputs import TokenClass
from train.sink_table import VALUE_PREFIXES, sink_values

LEADING_KEYS = 16
"""Keys whose own alphas are given."""

EPS = 0.3
"""Threshold of the best key (arXiv 2410.10781's)."""

_OF_ROWS = {"first_row": "row_", "document": "document_"}


@torch.no_grad()
def probe_sinks(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    half = HORIZON // 2
    for name, batch in inputs.prompts.items():
        output = decoder(batch, statistics="full")
        totals = SinkTotals(len(decoder.blocks))
        _add(totals, decoder, batch, output, min_queries=half)
        yield from _values(totals, name, VALUE_PREFIXES)
        yield from _best_keys(decoder, batch, output, inputs.token_class_V, name)
    totals = SinkTotals(len(decoder.blocks))
    for batch in inputs.context:
        _add(totals, decoder, batch, decoder(batch, statistics="full"), min_queries=HORIZON)
    if inputs.context:
        yield from _values(totals, "context", VALUE_PREFIXES | _OF_ROWS)


def _add(
    totals: SinkTotals,
    decoder: Decoder,
    batch: PackedBatch,
    output: DecoderOutput,
    min_queries: int,
) -> None:
    statistics = [record.statistics for record in output.layers]
    masks = decoder.layer_masks(batch.mask)
    totals.add(statistics, masks, batch.begins_BT, LEADING_KEYS, min_queries=min_queries)


def _values(totals: SinkTotals, name: str, prefixes: dict[str, str]) -> Iterable[Finding]:
    table = sink_values(totals.reduce(lambda sums: sums), prefixes)
    for row in table.itertuples(index=False):
        yield Finding(row.name, name, row.value, row.layer, row.head, row.position)


def _best_keys(
    decoder: Decoder, batch: PackedBatch, output: DecoderOutput, class_V: Tensor, name: str
) -> Iterator[Finding]:
    half = HORIZON // 2
    class_BS = class_V[batch.tokens_BT[:, :half]]
    for layer, mask in enumerate(decoder.layer_masks(batch.mask)):
        queries_BS = mask.queries_per_key_BS()[:, :half]
        # A window hides a prompt's first keys from later queries: they may have too few left.
        counts_BS = queries_BS >= half
        if not counts_BS.any():
            continue
        alpha_BHS = output.layers[layer].statistics.key_mass_BHS[..., :half] / queries_BS[:, None]
        alpha_BHS = torch.where(counts_BS[:, None], alpha_BHS, -1.0)
        alpha_BH, key_BH = alpha_BHS.max(dim=-1)
        class_BH = class_BS.gather(1, key_BH)
        values_H = {
            "best_alpha": alpha_BH.mean(0),
            "best_is_first": (key_BH == 0).double().mean(0),
        }
        for kind in TokenClass:
            chosen_BH = (alpha_BH > EPS) & (class_BH == kind)
            values_H[f"best_rate_030_{kind.name}"] = chosen_BH.double().mean(0)
        for what, value_H in values_H.items():
            for head, value in enumerate(value_H.tolist()):
                yield Finding(what, name, value, layer, head)
