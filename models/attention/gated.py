"""Gated attention: what a head gives, or fetches, times a sigmoid of the residual stream."""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from models.attention.softmax import SoftmaxAttention


class GateKind(StrEnum):
    """What has a gate of its own."""

    element = "element"
    head = "head"
    shared = "shared"


class GatePlace(StrEnum):
    """What is gated; torch.compile misreads a member that is called value."""

    output = "output"
    values = "values"


class GatedAttention(SoftmaxAttention):
    """out * sigmoid(W_g x), or the same of the values before attention (arXiv 2505.06708).

    x is the normed residual stream of the query, or of the key for a gate on its value.
    """

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=gated``."""

        gate: GateKind = GateKind.element
        """element: a gate for each dimension of each head; head: one for each head; shared: one for
        each dimension, the same in all heads."""

        place: GatePlace = GatePlace.output
        """output: of each head's output; values: of the values."""

    config: Config

    def __init__(self, config: Config, model):
        super().__init__(config, model)
        heads = self.num_heads if config.place is GatePlace.output else self.num_groups
        width = {
            GateKind.element: heads * self.head_dim,
            GateKind.head: heads,
            GateKind.shared: self.head_dim,
        }[config.gate]
        self.gate = nn.Linear(model.d_model, width, bias=False)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTGD, v_BTGE = super().project(x_BTC)
        if self.config.place is GatePlace.values:
            v_BTGE = self._gated(v_BTGE, x_BTC)
        return q_BTHD, k_BTGD, v_BTGE

    def finish(self, out_BTHE: Tensor, x_BTC: Tensor) -> Tensor:
        return self._gated(out_BTHE, x_BTC) if self.config.place is GatePlace.output else out_BTHE

    def _gated(self, y_BTHE: Tensor, x_BTC: Tensor) -> Tensor:
        gate = self.gate(x_BTC).sigmoid()
        heads = 1 if self.config.gate is GateKind.shared else y_BTHE.shape[2]
        return y_BTHE * gate.unflatten(-1, (heads, -1))
