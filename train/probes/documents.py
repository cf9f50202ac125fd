"""Whether documents have sinks of their own: their first keys against those further in.

In a row of many documents a sink may form at each document's start (arXiv 2504.02732). On the
run's own rows, of documents with at least 127 tokens that begin in their row:

    start_mass, start_excess, start_rate_020 ... _080     of the document's first key
    inner_mass, inner_excess, inner_rate_020 ... _080     of its keys at offsets 8 to 63
    samples                                               how many documents there were

alpha of the key at offset o is the mean attention that it gets from the 64 queries at offsets o to
o + 63, so that every key is seen by equally many; excess is alpha minus that of a head that attends
uniformly to what it sees. A rate thresholds each (document, key, layer, head), then averages.
Layers whose window hides a key from some of its 64 queries are left out. Without a document that
long there is no more than ``samples``.

Cost: one forward pass of the rows, one at a time, through the reference attention.

Axes: T queries and S keys of a row, H heads, O offsets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder
from train.metrics import HORIZON, THRESHOLDS
from train.probes.base import Finding, ProbeInputs
from train.probes.trace import cut, trace
from train.sink_table import threshold_name

INNER = range(8, 64)
"""Offsets of the keys that starts are compared with: not in the start's neighbourhood."""

LONG = INNER[-1] + HORIZON
"""Tokens that a document needs for each of its keys to have its 64 queries."""


@torch.no_grad()
def probe_documents(decoder: Decoder, inputs: ProbeInputs) -> Iterator[Finding]:
    """See the module."""
    samples, found = 0, {"start": [], "inner": []}
    for batch in inputs.context:
        for row in range(len(batch.tokens_BT)):
            starts = long_starts(batch, row)
            if not starts:
                continue
            samples += len(starts)
            own = cut(batch, slice(row, row + 1))
            probabilities = trace(decoder, own).probabilities_BHTS
            masks = [mask.dense_BTS()[0] for mask in decoder.layer_masks(own.mask)]
            for start in starts:
                for seen_HTS, visible_TS in zip(probabilities, masks, strict=True):
                    piece = slice(start, start + LONG)
                    visible_TS = visible_TS[piece]
                    alphas = _alphas(seen_HTS[0, :, piece, piece], visible_TS, start)
                    for name, values in zip(found, alphas, strict=True):
                        found[name] += [] if values is None else [values]
    yield Finding("samples", "context", float(samples))
    for name, values in found.items():
        if values:
            alpha, baseline = (torch.cat([pair[i] for pair in values]) for i in (0, 1))
            yield Finding(f"{name}_mass", "context", alpha.mean().item())
            yield Finding(f"{name}_excess", "context", (alpha - baseline).mean().item())
            for eps in THRESHOLDS:
                rate = (alpha > eps).double().mean().item()
                yield Finding(f"{name}_rate_{threshold_name(eps)}", "context", rate)


def long_starts(batch: PackedBatch, row: int) -> list[int]:
    """Where in a row documents begin of which it has ``LONG`` tokens or more."""
    document_T = batch.document_BT[row].tolist()
    begins_T = batch.begins_BT[row].tolist()
    return [
        t
        for t in range(len(document_T) - LONG + 1)
        if begins_T[t]
        and document_T[t] > 0
        and (t == 0 or document_T[t - 1] != document_T[t])
        and document_T[t + LONG - 1] == document_T[t]
    ]


def _alphas(
    seen_HTS: Tensor, visible_TS: Tensor, start: int
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """(alpha, baseline), flat over heads and keys, of the start and of the inner keys; None where a
    window hides one. seen_HTS: of the document's first ``LONG`` tokens, both ways; visible_TS: of
    these queries and all keys of the row."""
    num_heads = len(seen_HTS)
    share_T = 1 / visible_TS.sum(-1)
    pairs = []
    for offsets in ([0], INNER):
        queries_OQ = torch.tensor([list(range(o, o + HORIZON)) for o in offsets])
        keys_O1 = torch.tensor(list(offsets))[:, None]
        if not bool(visible_TS[queries_OQ, start + keys_O1].all()):
            pairs.append(None)
            continue
        alpha_HO = seen_HTS[:, queries_OQ, keys_O1].double().mean(-1)
        baseline_O = share_T[queries_OQ].double().mean(-1)
        pairs.append((alpha_HO.flatten(), baseline_O.repeat(num_heads)))
    return pairs[0], pairs[1]
