"""Norm ratios: how far a sink's hidden state and value stand out (arXiv 2410.10781, 2410.13835).

A sink token has a large hidden state (``massive_ratio`` well above 1) and a small value
(``value_ratio`` well below 1). Each ratio is a mean norm of first tokens over the median norm of
ordinary tokens, those at offsets >= 8:

    norm/...         first tokens of documents that begin in the row and have at least 64 tokens,
                     against the same documents' tokens
    norm_first/...   first tokens of rows, where the sink of a causal mask lies, against the rows'
"""

import torch

from models.batch import PackedBatch
from models.decoder import LayerRecord
from train.metrics import HORIZON, long_document_starts

ORDINARY_OFFSET = 8
"""Tokens nearer to their row's or document's start than this are not ordinary."""


def norm_ratios(layers: tuple[LayerRecord, ...], batch: PackedBatch) -> dict[str, float]:
    """``norm[_first]/{massive,value}_ratio/layer_03`` of one batch; synchronises with the device.

    Kinds without a first token in the batch, or rows under 64 tokens, are left out.
    """
    length = batch.tokens_BT.shape[1]
    if length < HORIZON:
        return {}
    document_start_BT = batch.mask.document_start_BT
    index_T = torch.arange(length, device=document_start_BT.device)
    is_text_BT = document_start_BT >= 0
    start_BK, exists_BK = long_document_starts(batch.begins_BT, document_start_BT)
    belongs_BTK = (document_start_BT[..., None] == start_BK[:, None]) & exists_BK[:, None]
    offset_BT = index_T - document_start_BT
    is_long_BT = belongs_BTK.any(-1)
    kinds = {
        "norm": (is_long_BT & (offset_BT == 0), is_long_BT & (offset_BT >= ORDINARY_OFFSET)),
        "norm_first": (is_text_BT & (index_T == 0), is_text_BT & (index_T >= ORDINARY_OFFSET)),
    }
    ratios = {}
    for prefix, (first_BT, ordinary_BT) in kinds.items():
        if not bool(first_BT.any()):
            continue
        for layer, record in enumerate(layers):
            norms = {
                "massive_ratio": record.hidden_norm_BT,
                "value_ratio": record.value_norm_BTG.mean(-1),
            }
            for name, norm_BT in norms.items():
                ratio = norm_BT[first_BT].mean() / norm_BT[ordinary_BT].median()
                ratios[f"{prefix}/{name}/layer_{layer:02d}"] = ratio
    values = torch.stack(list(ratios.values())).tolist()
    return dict(zip(ratios, values, strict=True))
