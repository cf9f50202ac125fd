"""``swiglu``: the gate of a feed-forward and its gradient, one pass over memory each."""

from kernels.swiglu.api import swiglu

__all__ = ["swiglu"]
