"""Weight initialisations: one function and one line in ``INITIALIZATIONS`` each.

They set the weights of embeddings and linear layers. Norms start at 1; whatever else an attention
kind learns (a sink logit, a key bias) it initialises itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from models.decoder import Decoder


def gu(decoder: Decoder) -> None:
    """N(0, 2 / (5 fan_in)); the feed-forward's output N(0, 1 / (fan_in L^2)) with L layers.

    What the released code of arXiv 2410.10781 does. fan_in is the last axis of the weight: the
    width of the residual stream for embeddings.
    """
    for module in _weighted(decoder):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * module.weight.shape[-1])))
    for block in decoder.blocks:
        weight = block.feed_forward.output.weight
        nn.init.normal_(weight, std=1 / (math.sqrt(weight.shape[-1]) * len(decoder.blocks)))


def normal(decoder: Decoder) -> None:
    """N(0, 0.02^2); both projections into the residual stream N(0, 0.02^2 / (2L)) (GPT-2)."""
    for module in _weighted(decoder):
        nn.init.normal_(module.weight, std=0.02)
    for block in decoder.blocks:
        for projection in (block.attention.output, block.feed_forward.output):
            nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * len(decoder.blocks)))


def _weighted(decoder: Decoder) -> list[nn.Module]:
    return [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.Embedding)]


INITIALIZATIONS: dict[str, Callable[[Decoder], None]] = {"normal": normal, "gu": gu}
"""``model.initialization``: functions that set a decoder's weights from the global generator."""
