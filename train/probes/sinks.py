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

and ``best_...`` of the key with the largest alpha, by class of its token
(``train.probes.best_keys``), means over samples by layer and head.

Cost: one forward pass of each input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from models.batch import PackedBatch
from models.decoder import Decoder, DecoderOutput
from train.metrics import HORIZON, SinkTotals
from train.probes.base import Finding, ProbeInputs
from train.probes.best_keys import HALF, best_keys
from train.sink_table import VALUE_PREFIXES, sink_values

LEADING_KEYS = 16
"""Keys whose own alphas are given."""

_OF_ROWS = {"first_row": "row_", "document": "document_"}


@torch.no_grad()
def probe_sinks(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    for name, batch in inputs.prompts.items():
        output = decoder(batch, statistics="full")
        totals = SinkTotals(len(decoder.blocks))
        _add(totals, decoder, batch, output, min_queries=HALF)
        yield from _values(totals, name, VALUE_PREFIXES)
        statistics = [record.statistics for record in output.layers]
        masks = decoder.layer_masks(batch.mask)
        keys = best_keys(statistics, masks, inputs.token_class_V, batch.tokens_BT)
        for layer, what, value_XH in keys:
            for head, value in enumerate(value_XH.mean(0).tolist()):
                yield Finding(what, name, value, layer, head)
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
