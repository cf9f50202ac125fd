"""The decoder, whole on one page: a LLaMA-style Transformer with pre-norm blocks.

    x = embed(tokens)
    for each block:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    logits = unembed(norm(x))

No biases and no dropout. The kinds of attention, position encoding, norm and feed-forward are
looked up by name, so a new one is its file and one line in its dict; the mask comes with the batch.
With softmax, rope, rms_norm and swiglu it computes what Hugging Face's ``LlamaForCausalLM`` does.

Axes: B rows, T positions, S key positions, C width of the residual stream, H query heads, G key and
value heads, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Statistics
from kernels.errors import require
from kernels.masks import IntervalMask
from models.attention import ATTENTIONS, AttentionConfig, LayerInputs, attention_name
from models.batch import PackedBatch
from models.feed_forwards import FEED_FORWARDS
from models.initialization import INITIALIZATIONS
from models.norms import NORMS, at_least_fp32
from models.overrides import LayerOverride, check_overrides
from models.positions import POSITIONS


@dataclass(kw_only=True)
class DecoderConfig:
    """Shape and kinds of a decoder; the attention kind has a config of its own."""

    num_layers: int
    """Blocks: the depth."""

    d_model: int
    """Width of the residual stream."""

    num_heads: int
    """Query heads of each layer."""

    num_kv_heads: int | None = None
    """Key and value heads of each layer, a divisor of num_heads; null = num_heads."""

    head_dim: int | None = None
    """Width of a head, any size; null = d_model / num_heads."""

    d_ff: int
    """Inner width of the feed-forward."""

    norm: str = "rms_norm"
    """Norm before each half of a block and before the unembedding: a name in NORMS."""

    norm_eps: float = 1e-5
    """Added to the mean square inside a norm."""

    position: str = "rope"
    """Position encoding: a name in POSITIONS."""

    rope_base: float = 10000.0
    """Wavelength of rope's slowest pair of dimensions, over 2 pi, in tokens."""

    feed_forward: str = "swiglu"
    """Feed-forward: a name in FEED_FORWARDS."""

    tie_embeddings: bool = False
    """Whether the unembedding is the embedding."""

    vocab_multiple: int = 64
    """The embedding has rows up to the next multiple of this, for the tensor cores; 1 = none more.

    The rows above the vocabulary have no logit, so they get no probability and no gradient.
    """

    initialization: str = "normal"
    """Initial weights: a name in INITIALIZATIONS."""

    def __post_init__(self):
        for field in ("num_layers", "d_model", "num_heads", "d_ff", "vocab_multiple"):
            require(
                getattr(self, field) >= 1, f"model.{field}", "must be >= 1", getattr(self, field)
            )
        for field in ("num_kv_heads", "head_dim"):
            value = getattr(self, field)
            require(value is None or value >= 1, f"model.{field}", "must be >= 1 or null", value)
        for field in ("norm_eps", "rope_base"):
            require(getattr(self, field) > 0, f"model.{field}", "must be > 0", getattr(self, field))
        require(
            self.num_heads % self.resolved_num_kv_heads == 0,
            "model.num_kv_heads",
            f"must divide model.num_heads = {self.num_heads}",
            self.num_kv_heads,
        )
        require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            "model.d_model",
            f"must be a multiple of model.num_heads = {self.num_heads} if model.head_dim is null",
            self.d_model,
        )
        for field, kinds in (
            ("norm", NORMS),
            ("position", POSITIONS),
            ("feed_forward", FEED_FORWARDS),
            ("initialization", INITIALIZATIONS),
        ):
            name = getattr(self, field)
            require(
                name in kinds, f"model.{field}", f"must be one of {', '.join(sorted(kinds))}", name
            )

    @property
    def resolved_num_kv_heads(self) -> int:
        """Key and value heads, whether set or derived."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of a head, whether set or derived."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim


class LayerRecord(NamedTuple):
    """What one layer measured; nothing in it carries a gradient.

    statistics: sums over the attention (None where statistics are off).
    hidden_norm_BT: l2 norm of the residual stream after the block (None where they are off).
    value_norm_BTG: l2 norm of each value vector (None where they are off).
    probabilities_BHTS: the attention matrix, of layers with an override only.

    Tensors are fp32, or fp64 for an fp64 model.
    """

    statistics: Statistics | None
    hidden_norm_BT: Tensor | None
    value_norm_BTG: Tensor | None
    probabilities_BHTS: Tensor | None


class DecoderOutput(NamedTuple):
    """logits_BTV, V the vocabulary without padding, and a record of each layer."""

    logits_BTV: Tensor
    layers: tuple[LayerRecord, ...]


class NumParameters(NamedTuple):
    """Learned numbers in all, and without embedding and unembedding (whose padded rows count)."""

    total: int
    non_embedding: int


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, attention: AttentionConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.d_model, config.norm_eps)
        self.attention = ATTENTIONS[attention_name(attention)](attention, config)
        self.feed_forward_norm = norm(config.d_model, config.norm_eps)
        self.feed_forward = FEED_FORWARDS[config.feed_forward](config.d_model, config.d_ff)

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> tuple[Tensor, LayerRecord]:
        attended = self.attention(self.attention_norm(x_BTC), inputs)
        x_BTC = x_BTC + attended.y_BTC
        x_BTC = x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))
        if inputs.override is not None:
            x_BTC = inputs.override.block_output(x_BTC)
        hidden_norm_BT = None
        if inputs.statistics != "off":
            hidden_norm_BT = torch.linalg.vector_norm(at_least_fp32(x_BTC.detach()), dim=-1)
        return x_BTC, LayerRecord(
            statistics=attended.statistics,
            hidden_norm_BT=hidden_norm_BT,
            value_norm_BTG=attended.value_norm_BTG,
            probabilities_BHTS=attended.probabilities_BHTS,
        )


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
        self.embedding = nn.Embedding(padded_size, config.d_model)
        self.position = POSITIONS[config.position](config)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
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
        if overrides is not None:
            check_overrides(overrides, len(self.blocks))
        masks = self.layer_masks(batch.mask)
        rotation = self.position.rotation(batch.positions_BT, self._precision)
        slopes_H = self.position.slopes(batch.tokens_BT.device)

        x_BTC = self.position.embed(self.embedding(batch.tokens_BT), batch.positions_BT)
        records = []
        for layer, block in enumerate(self.blocks):
            inputs = LayerInputs(
                mask=masks[layer],
                rotation=rotation,
                slopes_H=slopes_H,
                statistics=statistics,
                key_mass_tap_BHS=None if key_mass_taps is None else key_mass_taps[layer],
                override=None if overrides is None else overrides.get(layer),
            )
            x_BTC, record = block(x_BTC, inputs)
            records.append(record)
        weight_VC = (self.embedding if self.unembedding is None else self.unembedding).weight
        logits_BTV = F.linear(self.norm(x_BTC), weight_VC)[..., : self.vocab_size]
        return DecoderOutput(logits_BTV, tuple(records))

    def layer_masks(self, mask: IntervalMask) -> list[IntervalMask]:
        """What each layer sees of a batch's mask; layers with the same window share one object."""
        windows = [block.attention.config.window for block in self.blocks]
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

    def num_parameters(self) -> NumParameters:
        """How many parameters there are; tied embeddings count once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embeddings = self.embedding.weight.numel() * (1 if self.unembedding is None else 2)
        return NumParameters(total=total, non_embedding=total - embeddings)

    @property
    def _precision(self) -> torch.dtype:
        """fp64 for an fp64 model, else fp32: of angles, norms and statistics."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)
