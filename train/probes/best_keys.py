"""Which token has a head's best key: the one with the largest alpha of a sample.

alpha_k is the mean attention that key k gets from the queries that see it (arXiv 2410.10781). The
best key is taken among those of the first half of a 64-token prompt that at least 32 queries see:

    best_alpha            its alpha
    best_is_first         whether it is key 0
    best_rate_030_<C>     whether its alpha is > 0.3 and its token of class C (``TokenClass``)

Axes: B rows, T tokens, S keys of the first half, H query heads, X rows that have such a key,
V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.attention import Statistics
from kernels.masks import DenseMask, IntervalMask
from train.metrics import HORIZON
from train.probes.inputs import TokenClass

EPS = 0.3
"""Threshold of the best key (arXiv 2410.10781's)."""

HALF = HORIZON // 2
"""Keys that are looked at, and queries that must see them."""


def best_keys(
    statistics: Sequence[Statistics],
    masks: Sequence[IntervalMask | DenseMask],
    class_V: Tensor | None,
    tokens_BT: Tensor,
) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, name, value_XH) of the names above, a value a sample; their means are the figures.

    statistics, masks: by layer; key mass included. class_V: the ``TokenClass`` of each id, on the
    device of the tokens; None leaves out what needs it. tokens_BT: 64-token prompts.

    A layer whose window leaves all of these keys fewer than 32 queries yields nothing.
    """
    class_BS = None if class_V is None else class_V[tokens_BT[:, :HALF]]
    for layer, (record, mask) in enumerate(zip(statistics, masks, strict=True)):
        queries_BS = mask.queries_per_key_BS()[:, :HALF]
        # A window hides a prompt's first keys from later queries: they may have too few left.
        counts_BS = queries_BS >= HALF
        counts_B = counts_BS.any(1)
        if not counts_B.any():
            continue
        alpha_BHS = record.key_mass_BHS[..., :HALF] / queries_BS[:, None]
        alpha_BHS = torch.where(counts_BS[:, None], alpha_BHS, -1.0)
        alpha_XH, key_XH = alpha_BHS[counts_B].max(dim=-1)
        yield layer, "best_alpha", alpha_XH
        yield layer, "best_is_first", (key_XH == 0).double()
        if class_BS is None:
            continue
        class_XH = class_BS[counts_B].gather(1, key_XH)
        for kind in TokenClass:
            chosen_XH = (alpha_XH > EPS) & (class_XH == kind)
            yield layer, f"best_rate_030_{kind.name}", chosen_XH.double()
