"""Sink statistics got the usual way: one more forward, with every attention matrix written out.

Axes: B rows, T queries, S keys, H query heads, G key and value heads, D and E head dims.
"""

import torch
from torch import Tensor

from kernels.attention import AttentionOutput, Statistics
from kernels.attention.statistics import mass_at
from kernels.errors import require
from kernels.masks import DenseMask
from models.attention import Attention, LayerInputs, attention_name
from models.batch import PackedBatch
from models.decoder import Decoder
from train.config import RunConfig

MATRIX_BYTES = 4 * 2**30
"""Memory that the attention matrices of the rows in work may take, with what is made of them."""


def check_materialised(config: RunConfig) -> None:
    """Raise ``UserError`` unless a layer's attention is the softmax of its scores alone."""
    kind, position = attention_name(config.attention), config.model.position
    require(kind == "softmax", "attention", "must be softmax to be materialised here", kind)
    rule = "must have no slopes to be materialised here"
    require(position != "alibi", "model.position", rule, position)


class MaterialisedPass:
    """An eager forward without gradient over the weights of a decoder in training.

    The decoder made here shares those weights, so whatever is compiled of the other one stays.
    """

    def __init__(self, decoder: Decoder, *, bf16: bool):
        self.source, self.bf16 = decoder, bf16
        self.dense: dict[int, DenseMask] = {}
        with torch.device("meta"):
            self.decoder = Decoder(decoder.config, decoder.attention_config, decoder.vocab_size)
        for block in self.decoder.blocks:
            block.attention.attend = _Attend(block.attention, self.dense)
        # Logits are not wanted: those of one position cost nothing.
        self.decoder.norm.register_forward_pre_hook(lambda norm, args: (args[0][:, :1],))

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> list[Statistics]:
        """The statistics of each layer, entropies included."""
        # Parameters may have been elsewhere since the last time.
        self.decoder.load_state_dict(self.source.state_dict(), assign=True)
        with torch.autocast(batch.tokens_BT.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.decoder(batch, statistics="off")
        self.dense.clear()
        # Nothing of the other's weights is held while it is no turn of theirs.
        self.decoder.to("meta")
        return [record.statistics for record in output.layers]


class _Attend:
    """Stands in for a layer's ``attend``; dense: masks written out, by id, shared by all layers."""

    def __init__(self, attention: Attention, dense: dict[int, DenseMask]):
        self.row_sum = attention.config.row_sum
        self.dense = dense

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        inputs: LayerInputs,
        implementation: str,
    ) -> AttentionOutput:
        q_BHTD, k_BGSD, v_BGSE = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGE))
        heads_per_group = q_BHTD.shape[1] // k_BGSD.shape[1]
        k_BHSD, v_BHSE = (x.repeat_interleave(heads_per_group, 1) for x in (k_BGSD, v_BGSE))
        # Half-precision scores, and fp32 for the softmax, its output and the entropy's terms.
        _, H, T, _ = q_BHTD.shape
        rows = max(1, MATRIX_BYTES // (16 * H * T * T))
        if id(inputs.mask) not in self.dense:
            self.dense[id(inputs.mask)] = inputs.mask.to_dense()
        mask = self.dense[id(inputs.mask)]
        parts = [
            self._rows(q, k, v, visible, start)
            for q, k, v, visible, start in zip(
                *(
                    x.split(rows)
                    for x in (q_BHTD, k_BHSD, v_BHSE, mask.visible_BTS, mask.document_start_BT)
                ),
                strict=True,
            )
        ]
        outs, lses, statistics = zip(*parts, strict=True)
        joined = [None if x[0] is None else torch.cat(x) for x in zip(*statistics, strict=True)]
        out_BTHE = self.row_sum * torch.cat(outs).transpose(1, 2)
        return AttentionOutput(out_BTHE, torch.cat(lses), Statistics(*joined), None)

    def _rows(
        self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSE: Tensor, visible_BTS: Tensor, start_BT: Tensor
    ) -> tuple[Tensor, Tensor, Statistics]:
        scores_BHTS = q_BHTD @ k_BHSD.mT * q_BHTD.shape[-1] ** -0.5
        scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf)
        probabilities_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32)
        statistics = Statistics(
            first_mass_BHT=probabilities_BHTS[..., 0].clone(),
            document_mass_BHT=mass_at(probabilities_BHTS, start_BT),
            null_mass_BHT=None,
            key_mass_BHS=probabilities_BHTS.sum(2),
            max_logit_BH=scores_BHTS.amax((2, 3)).float(),
            entropy_BHT=torch.special.entr(probabilities_BHTS).sum(-1),
        )
        out_BHTE = probabilities_BHTS.to(v_BHSE.dtype) @ v_BHSE
        return out_BHTE, scores_BHTS.logsumexp(-1).float(), statistics
