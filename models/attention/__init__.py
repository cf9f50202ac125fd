"""Attention kinds: one file and one line in ``ATTENTIONS`` each."""

from kernels.errors import require
from models.attention.base import Attention, AttentionConfig, LayerInputs
from models.attention.elu_kernel import EluKernelAttention
from models.attention.elu_score import EluScoreAttention
from models.attention.gated import GatedAttention
from models.attention.head_norm import HeadNormAttention
from models.attention.identity_kernel import IdentityKernelAttention
from models.attention.key_bias import KeyBiasAttention, KeyValueBiasAttention
from models.attention.mlp_kernel import MlpKernelAttention
from models.attention.off_by_one import OffByOneAttention
from models.attention.qk_norm import QKNormAttention
from models.attention.sigmoid import SigmoidAttention
from models.attention.sink_logit import SinkLogitAttention
from models.attention.sink_token import SinkTokenAttention
from models.attention.softmax import SoftmaxAttention
from models.attention.softpick import SoftpickAttention
from models.attention.value_bias import ValueBiasAttention

ATTENTIONS: dict[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "off_by_one": OffByOneAttention,
    "sink_logit": SinkLogitAttention,
    "sink_token": SinkTokenAttention,
    "k_bias": KeyBiasAttention,
    "v_bias": ValueBiasAttention,
    "kv_bias": KeyValueBiasAttention,
    "gated": GatedAttention,
    "qk_norm": QKNormAttention,
    "head_norm": HeadNormAttention,
    "softpick": SoftpickAttention,
    "sigmoid": SigmoidAttention,
    "elu_score": EluScoreAttention,
    "identity_kernel": IdentityKernelAttention,
    "elu_kernel": EluKernelAttention,
    "mlp_kernel": MlpKernelAttention,
}
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
