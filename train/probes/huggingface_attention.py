"""Our attention as one of those that transformers can call, and what it keeps of each layer.

transformers lets an attention function be registered by name, and with it a function that writes
masks out. Ours calls ``sink_attention`` with a layer's queries, keys and values as they are after
rotations and norms, its scaling, its mask and, where it has them (gpt-oss), its learned sinks as
the null slot. The mask is the one that the model's own code asks for: causal, a sliding window or
chunks, by layer as the model has it.

Axes: B rows, T queries, S keys (S = T), H query heads, G key/value heads, D query/key head dim,
E value head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import Statistics, sink_attention
from kernels.errors import UserError
from kernels.masks import DenseMask, IntervalMask

ATTENTION_NAME = "sinklab"
"""What our attention is called among those of transformers."""

_HARMLESS = frozenset(
    {
        # What they say about visibility is in the mask.
        "is_causal",
        "sliding_window",
        # What they change was done to q, k or v, or isn't about attention.
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)
"""Arguments that may come with a layer's q, k and v and don't change its attention."""


@dataclass
class Recorder:
    """What the layers of one forward pass leave, in their order."""

    modules: list[nn.Module] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    masks: list[IntervalMask | DenseMask] = field(default_factory=list)
    value_norms: list[Tensor] = field(default_factory=list)
    # Layers share masks; a tensor that is kept here can't lend its id to another.
    built: dict[tuple[int, int], tuple[Tensor, IntervalMask | DenseMask]] = field(
        default_factory=dict
    )

    def mask_of(self, kind: str, mask_B1TS: Tensor, num_rows: int) -> IntervalMask | DenseMask:
        """A layer's mask as one of ours; layers that share one share the other."""
        key = (id(mask_B1TS), num_rows)
        if key not in self.built:
            visible_BTS = _visible_keys(kind, mask_B1TS).expand(num_rows, -1, -1)
            self.built[key] = (mask_B1TS, mask_of_visible(visible_BTS))
        return self.built[key][1]


_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Keep what the layers of the forward passes inside leave; outside nothing is measured."""
    recorder = Recorder()
    token = _current.set(recorder)
    try:
        yield recorder
    finally:
        _current.reset(token)


def transformers_with_our_attention() -> ModuleType:
    """The package, with our attention registered under ``ATTENTION_NAME``.

    Raises ``UserError`` if it is missing or older than release 5.
    """
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise UserError(
            "hf needs the package transformers, release 5: pip install -e '.[hf]'"
        ) from error
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _write_out)
    return transformers


def mask_of_visible(visible_BTS: Tensor) -> IntervalMask | DenseMask:
    """The mask of rows that are one document each: by intervals if every query's keys are one.

    visible_BTS: bool, on any device; that of the mask.
    """
    visible_BTS, device = visible_BTS.cpu(), visible_BTS.device
    num_tokens = visible_BTS.shape[1]
    count_BT = visible_BTS.sum(2, dtype=torch.int32)
    start_BT = visible_BTS.int().argmax(2).int()
    stop_BT = start_BT + count_BT
    document_start_BT = torch.zeros_like(start_BT)
    causal_T = torch.arange(1, num_tokens + 1, dtype=torch.int32)
    mask: IntervalMask | DenseMask = IntervalMask(
        start_BT=start_BT,
        # A query whose keys lie apart may be counted past the end; it makes the mask a dense one.
        stop_BT=stop_BT.clamp(max=num_tokens),
        document_start_BT=document_start_BT,
        is_causal=bool((start_BT == 0).all() and (stop_BT == causal_T).all()),
        one_document=True,
    )
    if not torch.equal(mask.dense_BTS(), visible_BTS):
        mask = DenseMask(visible_BTS=visible_BTS, document_start_BT=document_start_BT)
    return mask.to(device)


def _write_out(**settings: Any) -> Tensor:
    """bool [B, 1, T, S]: the mask that a model asks for, never left to a flag."""
    from transformers.masking_utils import sdpa_mask

    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**(settings | never))


def _attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer; out is [B, T, H, E]."""
    kind = type(module).__name__
    if dropout:
        others["dropout"] = dropout
    for name, value in others.items():
        if name not in _HARMLESS and value is not None and value is not False:
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            _refuse(kind, f"{name} {shown}")
    if query_BHTD.shape[2] != key_BGSD.shape[2]:
        _refuse(kind, f"{query_BHTD.shape[2]} queries and {key_BGSD.shape[2]} keys")
    if attention_mask is None:
        _refuse(kind, "no mask")
    recorder = _current.get()
    level = "off" if recorder is None else "full"
    mask = (recorder or Recorder()).mask_of(kind, attention_mask, len(query_BHTD))
    output = sink_attention(
        query_BHTD.transpose(1, 2),
        key_BGSD.transpose(1, 2),
        value_BGSE.transpose(1, 2),
        mask,
        scale=scaling,
        null_logit=s_aux,
        statistics=level,
    )
    if recorder is not None:
        recorder.modules.append(module)
        recorder.masks.append(mask)
        recorder.statistics.append(output.statistics)
        recorder.value_norms.append(value_BGSE.float().norm(dim=-1).transpose(1, 2))
    return output.out_BTHE, None


def _visible_keys(kind: str, mask_B1TS: Tensor) -> Tensor:
    """bool [B or 1, T, S]; an additive mask must hide keys or leave them alone."""
    if mask_B1TS.ndim != 4 or mask_B1TS.shape[1] != 1:
        _refuse(kind, f"a mask of shape {tuple(mask_B1TS.shape)}")
    if mask_B1TS.is_floating_point():
        is_hidden = mask_B1TS <= torch.finfo(mask_B1TS.dtype).min
        if not bool((is_hidden | (mask_B1TS == 0)).all()):
            _refuse(kind, "a bias in its mask")
        return ~is_hidden[:, 0]
    return mask_B1TS[:, 0].bool()


def _refuse(kind: str, what: str) -> None:
    raise UserError(f"hf must be a model that sink_attention can compute, got {kind} with {what}")
