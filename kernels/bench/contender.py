"""What a contender is: a way to compute attention that is checked and timed like every other.

A contender is prepared once for a problem (masks, compiled code), bound to as many sets of inputs
as the timing rotates through, and then called. Each may keep its tensors in the layout it likes
best; nothing that a training step would do once a batch is inside a call.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.bench.cases import Case, Inputs, Problem

LAYOUTS = ("BTHD", "BHTD")
"""Memory order behind PyTorch's [B, H, T, D]: a view of what projections give, or contiguous."""


BASIC = ("first_mass_BHT", "document_mass_BHT", "key_mass_BHS", "max_logit_BH")
"""The statistics of level ``basic``."""


class Skipped(Exception):
    """A contender can't run this case; the message says why."""


class Forward(NamedTuple):
    """What the forward pass gives.

    out: in the contender's own layout.
    measured: lse and statistics by name, each name ending in its axes (``first_mass_BHT``).
    """

    out: Tensor
    measured: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A contender bound to one set of inputs.

    leaves: q, k, v in the contender's own layout, then the key mass tap if it has one.
    grad_out: as ``Forward.out``. to_BTHD: takes the contender's layout to [B, T, heads, D].
    """

    forward: Callable[[], Forward]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor
    to_BTHD: Callable[[Tensor], Tensor]

    def backward(self, out: Tensor, *, again: bool = False) -> tuple[Tensor, ...]:
        """Gradients of the leaves; ``again`` keeps the graph for another backward pass."""
        return torch.autograd.grad(out, self.leaves, self.grad_out, retain_graph=again)

    def both(self) -> None:
        """One forward and one backward pass."""
        self.backward(self.forward().out)

    def quantities(self) -> dict[str, Tensor]:
        """Everything one forward and backward pass gives, by name with axes, for the check."""
        forward = self.forward()
        gradients = self.backward(forward.out)
        named = {"out_BTHD": self.to_BTHD(forward.out).detach(), **forward.measured}
        for name, gradient in zip(("dq_BTHD", "dk_BTGD", "dv_BTGD"), gradients, strict=False):
            named[name] = self.to_BTHD(gradient)
        if len(gradients) == 4:
            named["key_mass_BHS"] = gradients[3]
        return named


Bind = Callable[[Inputs], Call]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One name in the results.

    variants: ways to set it up that are tried, the fastest of which is timed; empty where the case
        is not for it. prepare: sets up one variant, or raises ``Skipped``.
    captures: its calls may be captured in a CUDA graph, which has memory of its own for each.
    compiles: its first call on a shape compiles code.
    gives: what it must measure beside output and gradients.
    """

    name: str
    variants: Callable[[Case], tuple[str, ...]]
    prepare: Callable[[Problem, str], Bind]
    captures: bool = True
    compiles: bool = False
    gives: tuple[str, ...] = ()


def bound(bind: Bind, inputs: Inputs) -> Call:
    """A call whose gradient of out lies in memory as out does.

    cuDNN and flash choose out's layout, and silently copy a gradient that comes in another.
    """
    call = bind(inputs)
    out = call.forward().out
    if out.stride() == call.grad_out.stride():
        return call
    return replace(call, grad_out=torch.empty_like(out).copy_(call.grad_out))


def leaves_in_layout(inputs: Inputs, layout: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """q, k, v as leaves, and the gradient of out, all [B, heads, T, D] in memory order ``layout``.

    A leaf in the order of the projections shares the inputs' memory.
    """
    moved = [tensor.detach().transpose(1, 2) for tensor in inputs]
    if layout == "BHTD":
        moved = [tensor.contiguous() for tensor in moved]
    *leaves, grad_out_BHTD = moved
    return tuple(leaf.requires_grad_() for leaf in leaves), grad_out_BHTD


def swap_heads_and_tokens(tensor: Tensor) -> Tensor:
    """[B, heads, T, D] to [B, T, heads, D] or back."""
    return tensor.transpose(1, 2)


def repeat_groups(k_BGTD: Tensor, num_heads: int) -> Tensor:
    """Keys or values repeated for every query head: [B, H, T, D]."""
    num_groups = k_BGTD.shape[1]
    return (
        k_BGTD if num_groups == num_heads else k_BGTD.repeat_interleave(num_heads // num_groups, 1)
    )
