"""The device's memory: each contender's peak, and room for those that don't fit side by side."""

from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

GIB = 2**30


class PeakMemory:
    """Peak of the memory allocated above what was there when this was made, in GiB; 0 on CPUs."""

    def __init__(self):
        self.before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.gib = 0.0

    def copy(self) -> "PeakMemory":
        """Another that goes on from here."""
        return copy(self)

    @contextmanager
    def counting(self):
        """Count what is done in here."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() - self.before
            self.gib = max(self.gib, peak / GIB)


class Contender(Protocol):
    """What takes turns; ``tensors`` is all it keeps on the device from step to step."""

    global_settings: "Settings"

    def tensors(self) -> list[Tensor]: ...


class Settings(Protocol):
    """Global settings that can be put in force."""

    def apply(self) -> None: ...


class Stage:
    """Who is on the device now.

    Whoever comes on gets its own global settings. While ``parking``, whoever goes off takes its
    tensors to the host's memory: three models of a billion parameters with their optimizers are
    more than a card holds.
    """

    def __init__(self):
        self.parking = False
        self.current: Contender | None = None
        self._homes: dict[int, Tensor] = {}

    def enter(self, contender: Contender) -> None:
        """Let ``contender`` have the device."""
        if contender is self.current:
            return
        self.leave()
        self._bring_back(contender)
        contender.global_settings.apply()
        self.current = contender

    def turn(self, contender: Contender, call: Callable[[], object]) -> Callable[[], None]:
        """``call`` with the device handed to ``contender`` first."""

        def turn() -> None:
            self.enter(contender)
            call()

        return turn

    def leave(self) -> None:
        """Nobody has the device."""
        if self.parking and self.current is not None:
            self._park(self.current)
        self.current = None

    def make_room(self, peak_gib: float, contenders: int) -> None:
        """Begin to park if contenders like the current one, alone here so far, don't fit."""
        if not torch.cuda.is_available() or self.current is None:
            return
        state = sum(t.nbytes for t in self.current.tensors() if t.is_cuda)
        total = torch.cuda.get_device_properties(0).total_memory
        # A plain peer may need more than ours at its peak, and caches leave gaps.
        needed = (contenders - 1) * 1.4 * state + 1.3 * peak_gib * GIB
        self.parking = needed > 0.9 * total

    def _park(self, contender: Contender) -> None:
        for tensor in contender.tensors():
            # Made again by the next backward pass.
            tensor.grad = None
            if not tensor.is_cuda:
                continue
            if id(tensor) not in self._homes:
                self._homes[id(tensor)] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            home = self._homes[id(tensor)]
            home.copy_(tensor.detach(), non_blocking=True)
        torch.cuda.synchronize()
        for tensor in contender.tensors():
            if tensor.is_cuda:
                tensor.data = self._homes[id(tensor)]

    def _bring_back(self, contender: Contender) -> None:
        for tensor in contender.tensors():
            if id(tensor) in self._homes and not tensor.is_cuda:
                tensor.data = tensor.data.to("cuda", non_blocking=True)
