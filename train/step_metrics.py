"""Metrics of one step that aren't sums over samples: largest score, entropy, norm ratios.

They are taken of the recorded step alone, over all of its micro-batches and ranks, which must all
ask for them.

Norm ratios say how far a sink's hidden state and value stand out (arXiv 2410.10781, 2410.13835). A
sink token has a large hidden state (``massive_ratio`` well above 1) and a small value
(``value_ratio`` well below 1). Each is a mean norm of first tokens over the median norm of ordinary
tokens, those at offsets >= 8:

    norm/...         first tokens of documents that begin in the row and have at least 64 tokens,
                     against the same documents' tokens
    norm_first/...   first tokens of rows, where the sink of a causal mask lies, against the rows'
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import Statistics
from kernels.masks import IntervalMask
from models.batch import PackedBatch
from models.decoder import LayerRecord
from train.metrics import HORIZON, long_document_starts
from train.ranks import gathered, largest, summed

ORDINARY_OFFSET = 8
"""Tokens nearer to their row's or document's start than this are not ordinary."""


class StepPart(NamedTuple):
    """One micro-batch of a step: statistics and masks by layer, ``step_norms``, the batch."""

    statistics: list[Statistics]
    masks: list[IntervalMask]
    norms: dict[str, Tensor]
    batch: PackedBatch


def attention_metrics(parts: list[StepPart]) -> dict[str, float]:
    """``attention/max_logit`` and (level full) ``attention/entropy`` in nats, whole and by layer.

    The largest scaled score over rows and heads; the mean entropy over heads and non-empty queries.
    """
    largest_L = torch.stack(
        [torch.stack([layer.max_logit_BH.amax() for layer in part.statistics]) for part in parts]
    ).amax(0)
    largest_L = largest(largest_L)
    metrics = _with_layers("attention/max_logit", largest_L, torch.amax)
    if parts[0].statistics[0].entropy_BHT is not None:
        sums_L, counts_L = 0, 0
        for part in parts:
            # Empty queries have entropy 0.
            entropy_L = [layer.entropy_BHT.mean(1).sum() for layer in part.statistics]
            queries_L = [(mask.keys_per_query_BT() > 0).sum() for mask in part.masks]
            sums_L, counts_L = sums_L + torch.stack(entropy_L), counts_L + torch.stack(queries_L)
        metrics |= _with_layers("attention/entropy", summed(sums_L) / summed(counts_L), torch.mean)
    return metrics


def _with_layers(name: str, value_L: Tensor, whole: Callable[[Tensor], Tensor]) -> dict[str, float]:
    by_layer = {f"{name}/layer_{i:02d}": v for i, v in enumerate(value_L.tolist())}
    return {name: whole(value_L).item(), **by_layer}


def norm_ratios(parts: list[StepPart]) -> dict[str, float]:
    """``norm[_first]/{massive,value}_ratio/layer_03``; synchronises with the device.

    Kinds without a first or an ordinary token in the step are left out.
    """
    chosen = [_first_and_ordinary(part.batch) for part in parts]
    norms = {
        name: gathered(torch.cat([part.norms[name] for part in parts])).flatten(0, 1)
        for name in parts[0].norms
    }
    ratios_L = {}
    for prefix in ("norm", "norm_first"):
        first_X, ordinary_X = (
            gathered(torch.cat([kinds[prefix][i] for kinds in chosen])).flatten().nonzero()[:, 0]
            for i in (0, 1)
        )
        if len(first_X) and len(ordinary_X):
            for name, norm_XL in norms.items():
                ordinary_L = _median(norm_XL[ordinary_X])
                ratios_L[f"{prefix}/{name}"] = norm_XL[first_X].mean(0) / ordinary_L
    return {
        f"{name}/layer_{layer:02d}": ratio
        for name, ratio_L in ratios_L.items()
        for layer, ratio in enumerate(ratio_L.tolist())
    }


def _median(value_XL: Tensor) -> Tensor:
    """The lower median over X, NaN if any value is. By sorting, which puts NaN last: a median along
    an axis isn't deterministic on GPUs."""
    sorted_LX = value_XL.T.sort(dim=-1).values
    last_L = sorted_LX[:, -1]
    return torch.where(last_L.isnan(), last_L, sorted_LX[:, (len(value_XL) - 1) // 2])


def step_norms(layers: tuple[LayerRecord, ...]) -> dict[str, Tensor]:
    """Norms [B, T, L] by the ratio that they go into."""
    return {
        "massive_ratio": torch.stack([layer.hidden_norm_BT for layer in layers], dim=-1),
        "value_ratio": torch.stack([layer.value_norm_BTG.mean(-1) for layer in layers], dim=-1),
    }


def _first_and_ordinary(batch: PackedBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Which tokens [B, T] are first and which ordinary, for documents and for rows."""
    document_start_BT = batch.mask.document_start_BT
    length = document_start_BT.shape[1]
    index_T = torch.arange(length, device=document_start_BT.device)
    is_text_BT = document_start_BT >= 0
    kinds = {"norm_first": (is_text_BT & (index_T == 0), is_text_BT & (index_T >= ORDINARY_OFFSET))}
    is_long_BT = torch.zeros_like(is_text_BT)
    if length >= HORIZON:
        start_BK, exists_BK = long_document_starts(batch.begins_BT, document_start_BT)
        belongs_BTK = document_start_BT[..., None] == start_BK[:, None]
        is_long_BT = (belongs_BTK & exists_BK[:, None]).any(-1)
    offset_BT = index_T - document_start_BT
    kinds["norm"] = (is_long_BT & (offset_BT == 0), is_long_BT & (offset_BT >= ORDINARY_OFFSET))
    return kinds
