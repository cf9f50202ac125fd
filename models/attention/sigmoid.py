"""Sigmoid attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.attention.checks import checked_number
from kernels.similarity import Similarity
from models.attention.similarity import SimilarityAttention

if TYPE_CHECKING:
    from models.decoder_config import DecoderConfig


class SigmoidAttention(SimilarityAttention):
    """sim = 1 / (1 + exp(-(q k / sqrt(D) + bias))).

    Without a bias it is arXiv 2410.10781's (Table 6); arXiv 2409.04431 has a bias and no N.
    """

    similarity = Similarity.sigmoid

    @dataclass(kw_only=True)
    class Config(SimilarityAttention.Config):
        """Settings of ``attention=sigmoid``."""

        bias: float = 0.0
        """Added to every score. At 0 a weight begins at 1/2 whatever the number of keys; at minus
        the logarithm of the context a whole row's begin with a sum near 1 (arXiv 2409.04431)."""

        def __post_init__(self):
            super().__post_init__()
            checked_number("bias", self.bias)

    def __init__(self, config: Config, model: "DecoderConfig"):
        super().__init__(config, model)
        self.bias = config.bias
