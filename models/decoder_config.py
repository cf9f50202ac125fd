"""What a decoder is made of: its shape, and the names of its kinds of parts."""

from dataclasses import dataclass
from enum import StrEnum

from kernels.errors import require
from models.feed_forwards import FEED_FORWARDS
from models.initialization import INITIALIZATIONS
from models.norms import NORMS
from models.positions import POSITIONS


class NormPlace(StrEnum):
    """Where the norms of a block are."""

    before = "before"
    after = "after"
    both = "both"


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
    """Norm of the residual stream: a name in NORMS."""

    norm_place: NormPlace = NormPlace.before
    """before: of what each half of a block reads; after: of the sum with what it adds, and none
    before the unembedding; both: of what it reads and of what it adds."""

    norm_eps: float = 1e-5
    """Added to the mean square inside a norm."""

    position: str = "rope"
    """Position encoding: a name in POSITIONS."""

    rope_base: float = 10000.0
    """Wavelength of rope's slowest pair of dimensions, over 2 pi, in tokens."""

    rope_share: float = 1.0
    """Share of a head's dimensions that rope turns, the first ones."""

    max_positions: int = 2048
    """Positions that learned positions have a vector for."""

    feed_forward: str = "swiglu"
    """Feed-forward: a name in FEED_FORWARDS."""

    match_parameters: bool = False
    """Widen feed-forwards of two matrices to 3/2 d_ff: as many parameters as those of three."""

    tie_embeddings: bool = False
    """Whether the unembedding is the embedding."""

    vocab_multiple: int = 64
    """The embedding has rows up to the next multiple of this, for the tensor cores; 1 = none more.

    The rows above the vocabulary have no logit, so they get no probability and no gradient.
    """

    initialization: str = "normal"
    """Initial weights: a name in INITIALIZATIONS."""

    fp32_residual: bool = False
    """Keep the residual stream in fp32 where the rest is bf16 (trainer.precision), not bf16 too."""

    def __post_init__(self):
        counts = ("num_layers", "d_model", "num_heads", "d_ff", "vocab_multiple", "max_positions")
        for field in counts:
            require(
                getattr(self, field) >= 1, f"model.{field}", "must be >= 1", getattr(self, field)
            )
        in_range = 0 < self.rope_share <= 1
        require(in_range, "model.rope_share", "must be > 0 and <= 1", self.rope_share)
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

    @property
    def resolved_d_ff(self) -> int:
        """Inner width of the feed-forward, widened if its parameters are to match."""
        narrow = self.match_parameters and len(FEED_FORWARDS[self.feed_forward].inputs) == 1
        return self.d_ff * 3 // 2 if narrow else self.d_ff
