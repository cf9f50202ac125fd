"""The decoder, whole on one page: a LLaMA-style Transformer with pre-norm blocks.

    x = embed(tokens)
    for each block:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    logits = unembed(norm(x))

No biases and no dropout. The kinds of attention, position encoding, norm and feed-forward are
looked up by name, so a new one is its class and one line in its dict; the mask comes with the
batch. A kind of attention may want a sink token, a learned vector that goes through the blocks
beside every row: it sees itself alone, so one copy serves all rows.
With softmax, rope, rms_norm and swiglu it computes what Hugging Face's ``LlamaForCausalLM`` does.

Axes: B rows, T positions, S key positions, C width of the residual stream, H query heads, G key and
value heads, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Statistics
from kernels.cross_entropy import linear_cross_entropy
from kernels.errors import require
from kernels.masks import IntervalMask
from models.attention import ATTENTIONS, AttentionConfig, LayerInputs, attention_name
from models.batch import PackedBatch
from models.decoder_config import DecoderConfig, NormPlace
from models.embedding import TokenEmbedding
from models.feed_forwards import FEED_FORWARDS
from models.initialization import INITIALIZATIONS
from models.norms import NORMS, at_least_fp32
from models.overrides import LayerOverride, check_overrides, overridden
from models.positions import POSITIONS


class LayerRecord(NamedTuple):
    """What one layer measured; nothing in it carries a gradient.

    statistics: sums over the attention (None where statistics are off).
    hidden_norm_BT: l2 norm of the residual stream after the block (None where they are off).
    value_BTGE: the values, in the compute dtype (None where they are off).
    probabilities_BHTS: the attention matrix, of layers with an override only.

    Other tensors are fp32, or fp64 for an fp64 model.
    """

    statistics: Statistics | None
    hidden_norm_BT: Tensor | None
    value_BTGE: Tensor | None
    probabilities_BHTS: Tensor | None

    @property
    def value_norm_BTG(self) -> Tensor | None:
        """l2 norm of each value vector, computed when asked for: few steps of training do."""
        if self.value_BTGE is None:
            return None
        # In one pass, without a copy of the values in that precision.
        dtype = torch.promote_types(self.value_BTGE.dtype, torch.float32)
        return torch.linalg.vector_norm(self.value_BTGE, dim=-1, dtype=dtype)


class DecoderOutput(NamedTuple):
    """logits_BTV, V the vocabulary without padding, and a record of each layer."""

    logits_BTV: Tensor
    layers: tuple[LayerRecord, ...]


class DecoderLoss(NamedTuple):
    """loss, the summed cross-entropy in nats (fp32 or fp64), and a record of each layer."""

    loss: Tensor
    layers: tuple[LayerRecord, ...]


class NumParameters(NamedTuple):
    """Learned numbers in all, and without embedding and unembedding (whose padded rows count)."""

    total: int
    non_embedding: int


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); ``model.norm_place`` moves the norms.

    after: norm(x + attention(x)) (arXiv 1706.03762). both: x + norm(attention(norm(x))).
    """

    def __init__(self, config: DecoderConfig, attention: AttentionConfig):
        super().__init__()

        def norm() -> nn.Module:
            return NORMS[config.norm](config.d_model, config.norm_eps)

        self.place = config.norm_place
        self.attention_norm = norm()
        self.attention = ATTENTIONS[attention_name(attention)](attention, config)
        self.feed_forward_norm = norm()
        self.feed_forward = FEED_FORWARDS[config.feed_forward](config.d_model, config.resolved_d_ff)
        has_both = self.place is NormPlace.both
        self.attention_output_norm = norm() if has_both else nn.Identity()
        self.feed_forward_output_norm = norm() if has_both else nn.Identity()

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> tuple[Tensor, LayerRecord]:
        if inputs.sink_11C is not None:
            inputs = inputs._replace(sink_11C=self._read(self.attention_norm, inputs.sink_11C))
        x_BTC = overridden(inputs.override, "input", x_BTC)
        attended = self.attention(self._read(self.attention_norm, x_BTC), inputs)
        x_BTC = self._add_both(x_BTC, attended.y_BTC, inputs.override)
        hidden_norm_BT = None
        if inputs.statistics != "off":
            hidden_norm_BT = torch.linalg.vector_norm(at_least_fp32(x_BTC.detach()), dim=-1)
        return x_BTC, LayerRecord(
            statistics=attended.statistics,
            hidden_norm_BT=hidden_norm_BT,
            value_BTGE=attended.value_BTGE,
            probabilities_BHTS=attended.probabilities_BHTS,
        )

    def alone(self, x_11C: Tensor) -> Tensor:
        """The block's output for a token that sees itself alone."""
        attended_11C = self.attention.alone(self._read(self.attention_norm, x_11C))
        return self._add_both(x_11C, attended_11C, None)

    def _add_both(self, x_BTC: Tensor, y_BTC: Tensor, override: LayerOverride | None) -> Tensor:
        y_BTC = overridden(override, "attention_output", self.attention_output_norm(y_BTC))
        x_BTC = overridden(override, "middle", self._sum(self.attention_norm, x_BTC, y_BTC))
        y_BTC = self.feed_forward(self._read(self.feed_forward_norm, x_BTC))
        y_BTC = self.feed_forward_output_norm(y_BTC)
        y_BTC = overridden(override, "feed_forward_output", y_BTC)
        x_BTC = self._sum(self.feed_forward_norm, x_BTC, y_BTC)
        return overridden(override, "output", x_BTC)

    def _read(self, norm: nn.Module, x_BTC: Tensor) -> Tensor:
        return x_BTC if self.place is NormPlace.after else norm(x_BTC)

    def _sum(self, norm: nn.Module, x_BTC: Tensor, y_BTC: Tensor) -> Tensor:
        return norm(x_BTC + y_BTC) if self.place is NormPlace.after else x_BTC + y_BTC


class Decoder(nn.Module):
    """A decoder with ``config.num_layers`` blocks, initialised from the global generator.

    attention: the config of an attention kind; it picks the kind.
    vocab_size: ids the tokenizer can produce.
    """

    def __init__(self, config: DecoderConfig, attention: AttentionConfig, vocab_size: int):
        super().__init__()
        require(vocab_size >= 2, "tokenizer.vocab_size", "must be >= 2", vocab_size)
        self.config = config
        self.attention_config = attention
        self.vocab_size = vocab_size
        padded_size = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.embedding = TokenEmbedding(padded_size, config.d_model)
        self.position = POSITIONS[config.position](config)
        kind = ATTENTIONS[attention_name(attention)]
        require(
            kind.takes_slopes or not self.position.has_slopes,
            "model.position",
            f"must have no slopes for attention={attention_name(attention)}",
            config.position,
        )
        self.sink_token = nn.Embedding(1, config.d_model) if kind.has_sink_token else None
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        is_normed = config.norm_place is NormPlace.after
        self.norm = (
            nn.Identity() if is_normed else NORMS[config.norm](config.d_model, config.norm_eps)
        )
        self.unembedding = (
            None if config.tie_embeddings else nn.Linear(config.d_model, padded_size, bias=False)
        )
        INITIALIZATIONS[config.initialization](self)

    def forward(
        self,
        batch: PackedBatch,
        overrides: Mapping[int, LayerOverride] | None = None,
        *,
        statistics: str = "basic",
        key_mass_taps: Sequence[Tensor] | None = None,
    ) -> DecoderOutput:
        """Logits of the next token at every position, and what each layer measured.

        overrides: interventions by layer (see ``models.overrides``).
        statistics: off, basic or full (with entropies).
        key_mass_taps: of ``key_mass_taps(batch)``; after ``backward`` the gradient of tap l is the
            attention that each key of layer l received, [B, H, S], and the statistics have none.

        Raises ``UserError`` for overrides of layers that don't exist or of another shape.
        """
        x_BTC, layers = self._blocks(batch, overrides, statistics, key_mass_taps)
        logits_BTV = F.linear(x_BTC, self._unembedding_VC)[..., : self.vocab_size]
        return DecoderOutput(logits_BTV, layers)

    def loss(
        self,
        batch: PackedBatch,
        overrides: Mapping[int, LayerOverride] | None = None,
        *,
        statistics: str = "basic",
        key_mass_taps: Sequence[Tensor] | None = None,
    ) -> DecoderLoss:
        """Cross-entropy summed over the batch's labels; on GPUs not all logits are kept for it.

        Everything else is as in ``forward``.
        """
        x_BTC, layers = self._blocks(batch, overrides, statistics, key_mass_taps)
        loss = linear_cross_entropy(
            x_BTC.to(_compute_dtype(x_BTC)).flatten(0, 1),
            self._unembedding_VC,
            batch.labels_BT.flatten(),
            vocab_size=self.vocab_size,
        )
        return DecoderLoss(loss, layers)

    def _blocks(
        self,
        batch: PackedBatch,
        overrides: Mapping[int, LayerOverride] | None,
        statistics: str,
        key_mass_taps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, tuple[LayerRecord, ...]]:
        """What the unembedding reads, [B, T, C], and a record of each layer."""
        if overrides is not None:
            check_overrides(overrides, len(self.blocks))
        masks = self.layer_masks(batch.mask)
        positions_BT, sink_11C = batch.positions_BT, None
        if self.sink_token is not None:
            first_11 = torch.zeros_like(positions_BT[:1, :1])
            sink_11C = self._residual(self.position.embed(self.sink_token(first_11), first_11))
            positions_BT = positions_BT + 1
        rotation = self.position.rotation(positions_BT, self._precision)
        slopes_H = self.position.slopes(batch.tokens_BT.device)

        x_BTC = self._residual(self.position.embed(self.embedding(batch.tokens_BT), positions_BT))
        records = []
        for layer, block in enumerate(self.blocks):
            inputs = LayerInputs(
                mask=masks[layer],
                rotation=rotation,
                slopes_H=slopes_H,
                statistics=statistics,
                key_mass_tap_BHS=None if key_mass_taps is None else key_mass_taps[layer],
                override=None if overrides is None else overrides.get(layer),
                sink_11C=sink_11C,
            )
            x_BTC, record = block(x_BTC, inputs)
            records.append(record)
            if sink_11C is not None:
                sink_11C = block.alone(sink_11C)
        return self.norm(x_BTC), tuple(records)

    def _residual(self, x_BTC: Tensor) -> Tensor:
        """The embedded tokens in the residual stream's dtype, which the blocks then keep."""
        return x_BTC if self.config.fp32_residual else x_BTC.to(_compute_dtype(x_BTC))

    @property
    def _unembedding_VC(self) -> Tensor:
        return (self.embedding if self.unembedding is None else self.unembedding).weight

    def layer_masks(self, mask: IntervalMask) -> list[IntervalMask]:
        """What each layer sees of a batch's mask; layers with the same window share one object."""
        windows = [b.attention.config.window_of(layer) for layer, b in enumerate(self.blocks)]
        masks = {w: mask if w is None else mask.window(w) for w in set(windows)}
        return [masks[w] for w in windows]

    def key_mass_taps(self, batch: PackedBatch) -> list[Tensor]:
        """A zero leaf [B, H, S] for each layer, whose gradient will be the layer's key mass."""
        batch_size, num_tokens = batch.tokens_BT.shape
        return [
            torch.zeros(
                batch_size,
                self.config.num_heads,
                num_tokens,
                dtype=self._precision,
                device=batch.tokens_BT.device,
                requires_grad=True,
            )
            for _ in self.blocks
        ]

    @property
    def alpha_kind(self) -> str:
        """What statistics are of: ``probability`` or ``proxy`` (see ``models.attention.base``)."""
        return self.blocks[0].attention.alpha_kind

    def num_parameters(self) -> NumParameters:
        """How many parameters there are; tied embeddings count once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embeddings = self.embedding.weight.numel() * (1 if self.unembedding is None else 2)
        return NumParameters(total=total, non_embedding=total - embeddings)

    @property
    def _precision(self) -> torch.dtype:
        """fp64 for an fp64 model, else fp32: of angles, norms and statistics."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What linear layers compute ``x`` in: autocast's dtype, or x's own without autocast."""
    device = x.device.type
    is_lowered = torch.is_autocast_enabled(device) and x.dtype == torch.float32
    return torch.get_autocast_dtype(device) if is_lowered else x.dtype
