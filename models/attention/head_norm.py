"""Head-wise RMSNorm: each head's output is normed before the output projection."""

from dataclasses import dataclass

from torch import Tensor

from models.attention.softmax import SoftmaxAttention
from models.norms import RMSNorm


class HeadNormAttention(SoftmaxAttention):
    """norm(softmax(q k^T / sqrt(D)) v), RMSNorm with a weight that heads share (arXiv 2605.06611).

    Where the paper has the norm is not known to us; this is before the output projection.
    """

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """Settings of ``attention=head_norm``."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.head_norm = RMSNorm(self.head_dim, model.norm_eps)

    def finish(self, out_BTHE: Tensor, x_BTC: Tensor) -> Tensor:
        return self.head_norm(out_BTHE)
