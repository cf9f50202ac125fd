"""What a probe is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from models.batch import PackedBatch
from models.decoder import Decoder


class Finding(NamedTuple):
    """One measured value; -1 where it is not of one layer, head or position.

    name: underscores, the field's words. input: one that ``train.probes.inputs`` names.
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
    rows: ``row_text``, ``row_bos_text`` and ``row_eos_text``, as long as the run's context, one
        piece of a document each; none if no held-out document is as long.
    context: held-out rows at the run's context, packed as the run packs.
    token_class_V: int, the class of each token id.
    trained_with_bos: whether the model knows the BOS.
    """

    prompts: dict[str, PackedBatch]
    context: list[PackedBatch]
    token_class_V: Tensor
    trained_with_bos: bool
    rows: dict[str, PackedBatch] = field(default_factory=dict)

    def natural(self) -> str:
        """The prompts that the model knows: ``bos_text`` if it was trained with BOS."""
        return "bos_text" if self.trained_with_bos else "text"


Probe = Callable[[Decoder, ProbeInputs], Iterable[Finding]]
"""A probe: the decoder in evaluation mode and the inputs to findings, the same every time."""
