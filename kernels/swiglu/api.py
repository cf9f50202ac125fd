"""The gate of SwiGLU on one product's output, by Triton where there is a GPU.

Axes: F inner width of the feed-forward; P = 2 F, the gate's half first.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.attention import checks
from kernels.errors import require


def swiglu(x_P: Tensor, *, implementation: str = "auto") -> Tensor:
    """silu(gate) * up of x = [gate, up] on the last axis: [..., 2 F] -> [..., F].

    silu(a) = a / (1 + exp(-a)) (Shazeer, arXiv 2002.05202). ``triton`` computes in fp32, rounds
    once, and writes the gradient of both halves in one pass, where a compiler would make the two
    apart and put them together; it can be differentiated once. ``reference`` is plain PyTorch;
    ``auto`` takes ``triton`` on GPUs.

    Raises ``UserError`` for an implementation that doesn't exist or can't run, and for an odd axis.
    """
    require(x_P.shape[-1] % 2 == 0, "x_P", "must end in an even axis", list(x_P.shape))
    if not checks.takes_triton(implementation, x_P):
        gate_F, up_F = x_P.chunk(2, dim=-1)
        return F.silu(gate_F) * up_F
    # Triton is imported where it is used: machines without it have the reference.
    from kernels.swiglu.fused import fused_swiglu

    return fused_swiglu(x_P)
