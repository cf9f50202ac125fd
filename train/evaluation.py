"""Held-out losses and sinks of a model, the same way during training and after it.

Losses: ``val/own_loss`` on rows packed as the run packs them; ``val/canonical_loss`` on fixed
held-out text whose labels are the same in every run on the corpus, the one loss to compare runs by;
``val/bits_per_byte`` the same in bits for each byte of the labels. The others are nats a label.

Sinks: ``probe/t64_text/...`` on 64-token prompts of held-out text, ``probe/t64_bos_text/...`` on
the BOS and the first 63, with the loss on the same labels.

On Bigram-Backcopy, ``backcopy/...``: the first key's mass by whether the query is a trigger.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.evaluation import ProbeKind
from data.module import TokenDataModule
from kernels.masks import IntervalMask
from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder
from train.metrics import HORIZON, SinkTotals
from train.sink_table import sink_metrics


@dataclass
class Evaluation:
    """``metrics`` by name; ``probes`` the sink sums behind ``probe/t64_<input>/...``."""

    metrics: dict[str, float] = field(default_factory=dict)
    probes: dict[str, SinkTotals] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    data: TokenDataModule,
    device: torch.device,
    probe_rows: int,
) -> Evaluation:
    """Everything above, in evaluation mode; all ranks compute the same.

    probe_rows: 64-token prompts of each kind.
    """
    training = decoder.training
    decoder.eval()
    result = Evaluation()
    metrics = result.metrics
    metrics["val/own_loss"] = _mean_loss(decoder, data.own_batches(), device)
    canonical = list(data.canonical_batches())
    metrics["val/canonical_loss"] = _mean_loss(decoder, canonical, device)
    labels = torch.cat([batch.labels_BT.flatten() for batch in canonical])
    bytes_per_label = data.label_bytes(labels).item() / int((labels != IGNORE_LABEL).sum())
    bits = metrics["val/canonical_loss"] / math.log(2)
    metrics["val/bits_per_byte"] = bits / bytes_per_label
    if data.packing.context >= HORIZON:
        for kind in probe_kinds(data):
            prefix = f"probe/t64_{kind}"
            totals = SinkTotals(len(decoder.blocks))
            loss = _mean_loss(
                decoder, [data.probe_batch(kind, HORIZON, probe_rows)], device, totals
            )
            metrics[f"{prefix}/loss"] = loss
            names = {"first": "", "null": "_null", "first_of_keys": "_of_keys"}
            metrics |= sink_metrics(totals, {key: prefix + end for key, end in names.items()})
            result.probes[kind] = totals
    if data.trigger_ids is not None:
        trigger_ids = torch.from_numpy(data.trigger_ids).to(device)
        metrics |= backcopy_metrics(decoder, canonical, trigger_ids, device)
    decoder.train(training)
    return result


def probe_kinds(data: TokenDataModule) -> tuple[ProbeKind, ...]:
    """The probe inputs there are: no BOS + text where the tokenizer has no BOS."""
    if data.tokenizer.bos_id is None:
        return (ProbeKind.text,)
    return (ProbeKind.text, ProbeKind.bos_text)


def _mean_loss(
    decoder: Decoder,
    batches: Iterable[PackedBatch],
    device: torch.device,
    totals: SinkTotals | None = None,
) -> float:
    """Nats a label over all batches; their sink statistics are added to ``totals`` if given."""
    loss = torch.zeros((), dtype=torch.float64, device=device)
    labels = 0
    for batch in batches:
        labels += int((batch.labels_BT != IGNORE_LABEL).sum())
        batch = batch.to(device)
        batch_loss, layers = decoder.loss(batch, statistics="off" if totals is None else "basic")
        loss += batch_loss
        if totals is not None:
            statistics = [record.statistics for record in layers]
            masks = decoder.layer_masks(batch.mask)
            totals.add(statistics, masks, batch.begins_BT, positions=HORIZON)
    return loss.item() / labels


def backcopy_metrics(
    decoder: Decoder, batches: list[PackedBatch], trigger_ids: Tensor, device: torch.device
) -> dict[str, float]:
    """``backcopy/{non_trigger,trigger}_{mass,baseline}``: attention to the row's first key.

    Means over queries other than the first key's own, over heads and layers. A trigger copies the
    token before it, so its head is busy; the others have nothing to fetch (arXiv 2410.13835). The
    baseline is the same of a head that attends uniformly to what it sees.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        layers = decoder(batch).layers
        mass_BT = torch.stack([r.statistics.first_mass_BHT.mean(1) for r in layers]).mean(0)
        # A layer with a window may hide the first key, so its share is 0 there like its mass.
        share_BT = torch.stack([_first_share(mask) for mask in decoder.layer_masks(batch.mask)])
        share_BT = share_BT.mean(0)
        keys_BT = batch.mask.keys_per_query_BT()
        is_trigger_BT = torch.isin(batch.tokens_BT, trigger_ids)
        counts_BT = keys_BT > 0
        counts_BT[:, 0] = False
        for row, chosen_BT in enumerate((counts_BT & ~is_trigger_BT, counts_BT & is_trigger_BT)):
            sums[row, 0] += chosen_BT.sum()
            sums[row, 1] += mass_BT[chosen_BT].sum()
            sums[row, 2] += share_BT[chosen_BT].sum()
    means = (sums[:, 1:] / sums[:, :1]).tolist()
    return {
        f"backcopy/{who}_{what}": value
        for who, pair in zip(("non_trigger", "trigger"), means, strict=True)
        for what, value in zip(("mass", "baseline"), pair, strict=True)
    }


def _first_share(mask: IntervalMask) -> Tensor:
    """What a query that attends uniformly pays to key 0, [B, T]."""
    sees_BT = mask.sees_BT(torch.zeros_like(mask.document_start_BT))
    return sees_BT / mask.keys_per_query_BT().clamp(min=1)
