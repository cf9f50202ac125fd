"""FLOPs of attention as PyTorch counts its own: every pair of query and key, whatever the mask.

Both attentions register these. Axes: B rows, T tokens, H heads, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Sequence


def forward_flops(q_shape: Sequence[int], v_shape: Sequence[int]) -> int:
    """Two products: 2 T^2 (D + E) a head."""
    batch_size, num_tokens, num_heads, head_dim = q_shape
    return 2 * batch_size * num_heads * num_tokens**2 * (head_dim + v_shape[3])


def backward_flops(q_shape: Sequence[int], v_shape: Sequence[int]) -> int:
    """Five products: scores and dP once each, dQ, dK and dV (rebuilding is not counted twice)."""
    batch_size, num_tokens, num_heads, head_dim = q_shape
    return 2 * batch_size * num_heads * num_tokens**2 * (3 * head_dim + 2 * v_shape[3])


def key_mass_flops(q_shape: Sequence[int], *_, out_shape=None, **__) -> int:
    """One product: the scores."""
    batch_size, num_tokens, num_heads, head_dim = q_shape
    return 2 * batch_size * num_heads * num_tokens**2 * head_dim
