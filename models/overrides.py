"""Interventions on single layers of a forward pass, and the way to read what a layer computes.

    decoder(batch, {3: LayerOverride(v=lambda v: v * 0)})     layer 3 with its values zeroed
    decoder(batch, {0: LayerOverride(output=clean_BTC)})      activation patching
    decoder(batch, {0: LayerOverride(feed_forward_output=lambda y: y * 0)})   without a feed-forward
    decoder(batch, {2: LayerOverride()}).layers[2].probabilities_BHTS     an attention matrix

A slot (a bias, a sink token) is no key: replaced values and masks leave it as it is, but for
queries whose mask hides every key, which have no slot either.

A callable sees the tensor it may replace, so one that keeps it and returns it unchanged reads it.

Axes: B rows, T query and S key positions, C width of the residual stream, H query heads, G key and
value heads, D head dim of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask

Replacement = Tensor | Callable[[Tensor], Tensor] | None


@dataclass(kw_only=True)
class LayerOverride:
    """What one layer uses instead of its own values; the layer runs the reference attention.

    In the order in which the block comes to them:

    input: x_BTC, the residual stream that the block reads; a sink token's own stays as it is.
    q, k, v: q_BTHD, k_BTGD, v_BTGE after the position encoding.
    mask: bool_BTS or a ``DenseMask``.
    attention_output: y_BTC, what the attention adds to the residual stream: after its own norm
        under ``model.norm_place=both``, before the norm of the sum under ``after``.
    middle: x_BTC, the residual stream between attention and feed-forward, normed under ``after``.
    feed_forward_output: y_BTC, the same of the feed-forward as ``attention_output``.
    output: output_BTC, the residual stream after the block.

    Each is a replacement, a callable from the layer's own value to one, or None. Raises
    ``UserError`` if a replacement has another shape or dtype than what it replaces.
    """

    input: Replacement = None
    q: Replacement = None
    k: Replacement = None
    v: Replacement = None
    mask: Tensor | DenseMask | Callable[[DenseMask], Tensor | DenseMask] | None = None
    attention_output: Replacement = None
    middle: Replacement = None
    feed_forward_output: Replacement = None
    output: Replacement = None

    def inputs(
        self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGE: Tensor, mask: IntervalMask
    ) -> tuple[Tensor, Tensor, Tensor, DenseMask]:
        """q, k, v and the mask that the layer's attention is to use."""
        return (
            _replaced("q", self.q, q_BTHD),
            _replaced("k", self.k, k_BTGD),
            _replaced("v", self.v, v_BTGE),
            self._replaced_mask(mask.to_dense()),
        )

    def _replaced_mask(self, own: DenseMask) -> DenseMask:
        if self.mask is None:
            return own
        mask = self.mask(own) if callable(self.mask) else self.mask
        is_dense = isinstance(mask, DenseMask)
        _check("mask", mask.visible_BTS if is_dense else mask, own.visible_BTS)
        return mask if is_dense else replace(own, visible_BTS=mask)


def overridden(override: LayerOverride | None, field: str, own_BTC: Tensor) -> Tensor:
    """What a block is to use instead of its own ``field``, one of those that are [B, T, C]."""
    return own_BTC if override is None else _replaced(field, getattr(override, field), own_BTC)


def check_overrides(overrides: Mapping[int, LayerOverride], num_layers: int) -> None:
    """Raise ``UserError`` unless ``overrides`` maps layers of the model to ``LayerOverride``."""
    for layer, override in overrides.items():
        known = isinstance(layer, int) and 0 <= layer < num_layers
        require(known, "overrides", f"must name layers 0 to {num_layers - 1}", layer)
        is_override = isinstance(override, LayerOverride)
        require(is_override, f"overrides[{layer}]", "must be a LayerOverride", type(override))


def _replaced(field: str, replacement: Replacement, own: Tensor) -> Tensor:
    if replacement is None:
        return own
    new = replacement(own) if callable(replacement) else replacement
    _check(field, new, own)
    return new


def _check(field: str, new: object, own: Tensor) -> None:
    if not (isinstance(new, Tensor) and new.shape == own.shape and new.dtype == own.dtype):
        raise UserError(f"LayerOverride.{field} must be {_shown(own)}, got {_shown(new)}")


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
