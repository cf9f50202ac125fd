"""What every attention kind shares: projections, position encoding, overrides, records.

A kind is a subclass with a ``Config`` of its own that overrides the hooks it needs:

    project   x -> q, k, v           (QK-norm, a gate on the values)
    attend    q, k, v, mask -> out   (the kernel: softmax, whose ``slot`` is a hook; a similarity)
    finish    out, x -> out          (a gate or a norm on the heads' outputs)

Axes: B rows, T query and S key positions, C width of the residual stream, H query heads, G key and
value heads, D head dim of queries and keys, E of values.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import AttentionOutput, Statistics
from kernels.attention.api import IMPLEMENTATIONS
from kernels.errors import require
from kernels.masks import DenseMask, IntervalMask
from models.overrides import LayerOverride
from models.positions import Rotation

if TYPE_CHECKING:
    from kernels.similarity import SimilarityOutput
    from models.decoder_config import DecoderConfig


@dataclass(kw_only=True)
class AttentionConfig:
    """Settings that every kind has."""

    window: int | None = None
    """Keys a query sees at most, itself included, in tokens; null = all that its mask allows."""

    global_every: int | None = None
    """Every n-th layer, from layer n on, has no window; null = all have it."""

    implementation: str = "auto"
    """Kernel that computes it: auto takes the fastest that can, another name forces that one."""

    def __post_init__(self):
        valid = self.window is None or self.window >= 1
        require(valid, "attention.window", "must be >= 1 or null", self.window)
        every = self.global_every
        valid = every is None or (every >= 1 and self.window is not None)
        allowed = "must be >= 1 beside a window, or null"
        require(valid, "attention.global_every", allowed, every)
        allowed = f"must be one of {', '.join(IMPLEMENTATIONS)}"
        known = self.implementation in IMPLEMENTATIONS
        require(known, "attention.implementation", allowed, self.implementation)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, None where it sees all that its mask allows."""
        every = self.global_every
        return None if every is not None and (layer + 1) % every == 0 else self.window


class LayerInputs(NamedTuple):
    """What a layer gets beside the residual stream; only tap and override differ between layers.

    mask: the layer's own, its window included; dense under an override.
    rotation, slopes_H: of the position encoding, None where it has none.
    statistics: off, basic or full.
    key_mass_tap_BHS: leaf whose gradient will be the key mass, or None.
    sink_11C: the sink token's residual stream as the layer reads it, of kinds that have one.
    """

    mask: IntervalMask | DenseMask
    rotation: Rotation | None
    slopes_H: Tensor | None
    statistics: str
    key_mass_tap_BHS: Tensor | None
    override: LayerOverride | None
    sink_11C: Tensor | None = None


class Attended(NamedTuple):
    """y_BTC, what a layer adds to the residual stream, and its measurements (no gradient).

    statistics: of the kernel, None where they are off.
    value_BTGE: the values, None where statistics are off.
    probabilities_BHTS: the attention matrix, only under an override.
    """

    y_BTC: Tensor
    statistics: Statistics | None
    value_BTGE: Tensor | None
    probabilities_BHTS: Tensor | None


class Attention(nn.Module, ABC):
    """Multi-head attention with grouped key and value heads and no biases.

    alpha_kind: what the statistics are sums of: ``probability``, a softmax's; or ``proxy``,
    |weight| over a query's absolute sum of them, for weights of any other kind (arXiv 2410.10781,
    section 7). takes_slopes: whether ALiBi's slopes can be added to its scores. has_sink_token:
    whether the decoder is to carry a sink token for it.
    """

    Config: type[AttentionConfig]
    alpha_kind: ClassVar[str] = "probability"
    takes_slopes: ClassVar[bool] = True
    has_sink_token: ClassVar[bool] = False

    def __init__(self, config: AttentionConfig, model: "DecoderConfig"):
        super().__init__()
        self.config = config
        self.num_heads = model.num_heads
        self.num_groups = model.resolved_num_kv_heads
        self.head_dim = model.resolved_head_dim
        query_width = model.num_heads * self.head_dim
        key_width = self.num_groups * self.head_dim
        self.query = nn.Linear(model.d_model, query_width, bias=False)
        self.key = nn.Linear(model.d_model, key_width, bias=False)
        self.value = nn.Linear(model.d_model, key_width, bias=False)
        self.output = nn.Linear(query_width, model.d_model, bias=False)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTHD, k_BTGD, v_BTGE of the normed residual stream, before the position encoding."""
        # One product, as in gated feed-forwards.
        projections = (self.query, self.key, self.value)
        weight_PC = torch.cat([projection.weight for projection in projections])
        x_BTPD = F.linear(x_BTC, weight_PC).unflatten(-1, (-1, self.head_dim))
        heads = [self.num_heads, self.num_groups, self.num_groups]
        q_BTHD, k_BTGD, v_BTGE = x_BTPD.split(heads, dim=2)
        return q_BTHD, k_BTGD, v_BTGE

    @abstractmethod
    def attend(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        inputs: LayerInputs,
        implementation: str,
    ) -> "AttentionOutput | SimilarityOutput":
        """Attention over the keys that ``inputs.mask`` shows, by a kernel of that name."""

    def finish(self, out_BTHE: Tensor, x_BTC: Tensor) -> Tensor:
        """The heads' outputs as the output projection takes them."""
        return out_BTHE

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Attended:
        q_BTHD, k_BTGD, v_BTGE = self.project(x_BTC)
        if inputs.rotation is not None:
            q_BTHD, k_BTGD = inputs.rotation(q_BTHD), inputs.rotation(k_BTGD)
        override, implementation = inputs.override, self.config.implementation
        if override is not None:
            q_BTHD, k_BTGD, v_BTGE, mask = override.inputs(q_BTHD, k_BTGD, v_BTGE, inputs.mask)
            inputs, implementation = inputs._replace(mask=mask), "reference"
        result = self.attend(q_BTHD, k_BTGD, v_BTGE, inputs, implementation)
        return Attended(
            y_BTC=self.output(self.finish(result.out_BTHE, x_BTC).flatten(2)),
            statistics=result.statistics,
            value_BTGE=None if inputs.statistics == "off" else v_BTGE.detach(),
            probabilities_BHTS=None if override is None else result.probabilities_BHTS.detach(),
        )

    def alone(self, x_11C: Tensor) -> Tensor:
        """What the layer adds for a token that sees itself alone: its own value, projected."""
        _, _, v_11GE = self.project(x_11C)
        return self.output(self.finish(self.sole_value(v_11GE), x_11C).flatten(2))

    def sole_value(self, v_BTGE: Tensor) -> Tensor:
        """out_BTHE of tokens that see themselves alone, given their values."""
        return v_BTGE.repeat_interleave(self.num_heads // v_BTGE.shape[2], dim=2)
