"""Plain softmax attention, and the base of kinds that add a slot, a bias, a gate or a norm."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kernels.attention import AttentionOutput, null_mass, sink_attention
from kernels.errors import require
from models.attention.base import Attention, AttentionConfig, LayerInputs


class Slot(NamedTuple):
    """Something beside the keys that attention may go to.

    logit: [H] or [B, H, T], its score. value_HE: what it adds, None for nothing.
    """

    logit: Tensor
    value_HE: Tensor | None = None


class SoftmaxAttention(Attention):
    """out_i = a sum_j softmax_j(q_i k_j / sqrt(D)) v_j over i's visible keys (arXiv 1706.03762).

    a = ``row_sum`` is 1 but in one ablation (arXiv 2410.10781, Table 14); statistics are of the
    softmax. A kind with a slot overrides ``slot``.
    """

    @dataclass(kw_only=True)
    class Config(AttentionConfig):
        """Settings of ``attention=softmax``, which the kinds built on it share."""

        row_sum: float = 1.0
        """What the weights of a query sum to, the slot's included."""

        def __post_init__(self):
            super().__post_init__()
            require(self.row_sum > 0, "attention.row_sum", "must be > 0", self.row_sum)

    config: Config

    def slot(self, q_BTHD: Tensor, inputs: LayerInputs) -> Slot | None:
        """The slot, given queries after the position encoding."""
        return None

    def attend(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        inputs: LayerInputs,
        implementation: str,
    ) -> AttentionOutput:
        slot = self.slot(q_BTHD, inputs)
        result = sink_attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            inputs.mask,
            null_logit=None if slot is None else slot.logit,
            slopes_H=inputs.slopes_H,
            statistics=inputs.statistics,
            key_mass_tap_BHS=inputs.key_mass_tap_BHS,
            implementation=implementation,
        )
        out_BTHE = result.out_BTHE
        if slot is not None and slot.value_HE is not None:
            mass_BTH = null_mass(slot.logit, result.lse_BHT).transpose(1, 2)
            added_BTHE = mass_BTH[..., None] * slot.value_HE
            out_BTHE = (out_BTHE + added_BTHE).to(out_BTHE.dtype)
        return result._replace(out_BTHE=self._scaled(out_BTHE))

    def sole_value(self, v_BTGE: Tensor) -> Tensor:
        return self._scaled(super().sole_value(v_BTGE))

    def _scaled(self, out_BTHE: Tensor) -> Tensor:
        return out_BTHE if self.config.row_sum == 1 else self.config.row_sum * out_BTHE
