"""What goes into and comes out of a call of the kernels.

Axes: B rows of the batch, T query and key positions, H query heads, G key/value heads, D query/key
head dim, E value head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.attention.fused.tensors import MaskTensors


class Call(NamedTuple):
    """What the kernels of a forward or a backward pass take alike; names are those of
    ``similarity_attention``.
    """

    q_BTHD: Tensor
    k_BTGD: Tensor
    v_BTGE: Tensor
    mask: MaskTensors
    slopes_H: Tensor | None
    scale: float
    bias: float
    similarity: str
    normalize: str
    level: str


class ForwardOutputs(NamedTuple):
    """What the forward fills, fp32 but for out; what nobody needs has no elements.

    abs_BHT: sum_j abs(f), softpick's over N. norm_BHT: softpick's log2 N, or the signed sum of a
    normalized identity. document_BHT is not needed where rows have one document: it is first_BHT.
    """

    out_BTHE: Tensor
    abs_BHT: Tensor
    norm_BHT: Tensor
    first_BHT: Tensor
    document_BHT: Tensor
    max_BH: Tensor
    entropy_BHT: Tensor


class BackwardOutputs(NamedTuple):
    """What the backward fills; key mass has no elements where nobody asks for it."""

    dq_BTHD: Tensor
    dk_BTGD: Tensor
    dv_BTGE: Tensor
    key_mass_BHT: Tensor
