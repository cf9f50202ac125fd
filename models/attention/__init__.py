"""Attention kinds: one file and one line in ``ATTENTIONS`` each."""

from kernels.errors import require
from models.attention.base import Attention, AttentionConfig, LayerInputs
from models.attention.softmax import SoftmaxAttention

ATTENTIONS: dict[str, type[Attention]] = {"softmax": SoftmaxAttention}
"""``attention=NAME``: subclasses of ``Attention``, each with a ``Config`` of its own."""


def attention_name(config: AttentionConfig) -> str:
    """The name of the kind that ``config`` belongs to."""
    names = [name for name, kind in ATTENTIONS.items() if kind.Config is type(config)]
    allowed = f"must be the Config of one of {', '.join(sorted(ATTENTIONS))}"
    require(len(names) == 1, "attention", allowed, type(config).__qualname__)
    return names[0]


__all__ = [
    "ATTENTIONS",
    "Attention",
    "AttentionConfig",
    "LayerInputs",
    "SoftmaxAttention",
    "attention_name",
]
