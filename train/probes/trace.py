"""One forward pass with everything that probes look at, and what they do to it.

    trace(decoder, batch).hidden_BTC[0]                     the embedded tokens
    trace(decoder, batch, everywhere(decoder, mask=hide_first)).probabilities_BHTS[3]

Every layer runs the reference attention, which writes its matrix out: O(B H T^2) memory a layer.

Axes: B rows, T query and S key positions, C width of the residual stream, H query heads, G key and
value heads, D head dim of queries and keys, E of values, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.masks import DenseMask
from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder
from models.norms import at_least_fp32
from models.overrides import LayerOverride, Replacement

MaskChange = Callable[[DenseMask], DenseMask]


class Trace(NamedTuple):
    """What one forward pass computed, interventions included; a list has an item a layer.

    hidden_BTC: the residual stream, embedded at index 0 and after layer l at index l + 1.
    middle_BTC: the residual stream between attention and feed-forward of layer l.
    q_BTHD, k_BTGD, v_BTGE: after the position encoding, as the attention used them.
    probabilities_BHTS: the attention matrix without a slot; of kinds that are no softmax the
        papers' proxy (``Decoder.alpha_kind``).
    slot_BHT: attention to the slot; None where the kind has none.
    logits_BTV: of the next token.
    """

    hidden_BTC: list[Tensor]
    middle_BTC: list[Tensor]
    q_BTHD: list[Tensor]
    k_BTGD: list[Tensor]
    v_BTGE: list[Tensor]
    probabilities_BHTS: list[Tensor]
    slot_BHT: list[Tensor | None]
    logits_BTV: Tensor


@torch.no_grad()
def trace(
    decoder: Decoder, batch: PackedBatch, overrides: Mapping[int, LayerOverride] | None = None
) -> Trace:
    """Run the decoder under ``overrides`` and keep what it computes; no gradients.

    What an override replaces is kept as replaced. Raises ``UserError`` as ``Decoder`` does.
    """
    num_layers = len(decoder.blocks)
    kept = {name: [] for name in ("input", "middle", "q", "k", "v", "output")}
    reading = dict(overrides or {})
    for layer in range(num_layers):
        override = reading.get(layer, LayerOverride())
        if isinstance(override, LayerOverride):
            readers = {name: _reader(getattr(override, name), kept[name]) for name in kept}
            reading[layer] = dataclasses.replace(override, **readers)
    output = decoder(batch, reading)
    return Trace(
        hidden_BTC=[kept["input"][0], *kept["output"]],
        middle_BTC=kept["middle"],
        q_BTHD=kept["q"],
        k_BTGD=kept["k"],
        v_BTGE=kept["v"],
        probabilities_BHTS=[record.probabilities_BHTS for record in output.layers],
        slot_BHT=[record.statistics.null_mass_BHT for record in output.layers],
        logits_BTV=output.logits_BTV,
    )


def _reader(replacement: Replacement, kept: list[Tensor]) -> Replacement:
    """``replacement`` that also puts what it gives into ``kept``."""

    def read(own: Tensor) -> Tensor:
        new = replacement(own) if callable(replacement) else replacement
        new = own if replacement is None else new
        kept.append(new)
        return new

    return read


def everywhere(decoder: Decoder, **fields: object) -> dict[int, LayerOverride]:
    """The same ``LayerOverride`` in every layer."""
    return {layer: LayerOverride(**fields) for layer in range(len(decoder.blocks))}


def hide_key(position: int) -> MaskChange:
    """The key at ``position`` hidden from every later query; it is still there and sees itself."""

    def change(mask: DenseMask) -> DenseMask:
        visible_BTS = mask.visible_BTS.clone()
        visible_BTS[:, position + 1 :, position] = False
        return dataclasses.replace(mask, visible_BTS=visible_BTS)

    return change


hide_first: MaskChange = hide_key(0)
"""Key 0 hidden from every later query."""


def see_itself_alone(position: int) -> MaskChange:
    """The query at ``position`` sees its own key alone; the others see what they saw."""

    def change(mask: DenseMask) -> DenseMask:
        visible_BTS = mask.visible_BTS.clone()
        visible_BTS[:, position] = False
        visible_BTS[:, position, position] = True
        return dataclasses.replace(mask, visible_BTS=visible_BTS)

    return change


def zero_at(position: int) -> Callable[[Tensor], Tensor]:
    """What is [B, T, C] with zeros at ``position``."""

    def change(y_BTC: Tensor) -> Tensor:
        y_BTC = y_BTC.clone()
        y_BTC[:, position] = 0
        return y_BTC

    return change


def cut(batch: PackedBatch, rows: int | slice, tokens: int | None = None) -> PackedBatch:
    """The first rows of a batch, or those of a slice; under a causal mask also of each row the
    first tokens (all by default)."""
    assert tokens is None or batch.mask.is_causal
    num_tokens = batch.tokens_BT.shape[1] if tokens is None else tokens
    rows = slice(rows) if isinstance(rows, int) else rows

    def cut_fields(value: object) -> dict[str, Tensor]:
        names = [field.name for field in dataclasses.fields(value) if field.name.endswith("_BT")]
        return {name: getattr(value, name)[rows, :num_tokens] for name in names}

    fields = cut_fields(batch)
    fields["num_labels"] = (fields["labels_BT"] != IGNORE_LABEL).sum()
    mask = dataclasses.replace(batch.mask, **cut_fields(batch.mask))
    return dataclasses.replace(batch, **fields, mask=mask)


def norms_BT(hidden_BTC: Tensor) -> Tensor:
    """l2 norms, fp32 or better."""
    return torch.linalg.vector_norm(at_least_fp32(hidden_BTC), dim=-1)


def norm_ratio_B(hidden_BTC: Tensor, position: int) -> Tensor:
    """Norm at ``position`` over the median norm of the row's other positions."""
    norm_BT = norms_BT(hidden_BTC)
    others = [t for t in range(norm_BT.shape[1]) if t != position]
    median_B = lower_median(norm_BT[:, others])
    return norm_BT[:, position] / median_B.clamp(min=torch.finfo(norm_BT.dtype).tiny)


def lower_median(x_BX: Tensor) -> Tensor:
    """[B], the median of each row, the lower one of two, as ``torch.median`` takes it.

    That function's indices are none that deterministic algorithms could give on a GPU.
    """
    return x_BX.sort(dim=1).values[:, (x_BX.shape[1] - 1) // 2]
