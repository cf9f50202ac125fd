"""What a probe is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder


class Finding(NamedTuple):
    """One measured value; -1 where it is not of one layer, head or position.

    name: underscores, the field's words. input: text, bos_text, random, repeated,
    written or context.
    """

    name: str
    input: str
    value: float
    layer: int = -1
    head: int = -1
    position: int = -1


@dataclass(frozen=True, kw_only=True)
class ProbeInputs:
    """Token ids that probes run on, on the model's device.

    prompts: 64-token prompts by input name, causal mask; ``text`` always, ``bos_text`` where there
        is a BOS.
    context: held-out rows at the run's context, packed as the run packs.
    token_class_V: int, the class of each token id.
    trained_with_bos: whether the model knows the BOS.
    """

    prompts: dict[str, PackedBatch]
    context: list[PackedBatch]
    token_class_V: Tensor
    trained_with_bos: bool

    def natural(self) -> str:
        """The prompts that the model knows: ``bos_text`` if it was trained with BOS."""
        return "bos_text" if self.trained_with_bos else "text"


Probe = Callable[[Decoder, ProbeInputs], Iterable[Finding]]
"""A probe: the decoder in evaluation mode and the inputs to findings, the same every time."""
