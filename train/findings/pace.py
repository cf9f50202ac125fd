"""How fast the runs of a campaign are that share devices, and which would still be done in time.

A run needs so many seconds of its device; of n at once each gets 1 / max(n, ``NO_SLOWER``) of the
time on the clock. What a run needs is known from those that ended, by the token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

NO_SLOWER = 3
"""So many at once are taken to be done as soon as one alone: while a run starts, is compiled and
probed, some third of its time, its device waits. Too high a number begins fewer runs, none late."""

STARTING = 1 / 3
"""Share of a run that no earlier start spares it: starting, compiling, probing."""


@dataclass
class Turn:
    """A run in its slot, in seconds. needs: of its device, all in all; had: of these, so far;
    clock: since it began; cost: the same, shared out among the runs beside it."""

    needs: float
    had: float = 0.0
    clock: float = 0.0
    cost: float = 0.0


class Device:
    """The runs on one device, by slot."""

    def __init__(self):
        self.turns: dict[int, Turn] = {}

    def advance(self, passed: float) -> None:
        """So many seconds on the clock went by."""
        count = len(self.turns)
        for turn in self.turns.values():
            turn.had += passed / max(count, NO_SLOWER)
            turn.clock += passed
            turn.cost += passed / count

    def lasts(self, seconds: float) -> float:
        """On the clock, until all are done, if another that needs so many began now."""
        left = [max(0.0, turn.needs - turn.had) for turn in self.turns.values()]
        clock = done = 0.0
        for index, needs in enumerate(sorted([*left, seconds])):
            clock += (needs - done) * max(len(left) + 1 - index, NO_SLOWER)
            done = needs
        return clock


class Pace:
    """Slots for runs, on devices in turn.

    deadline: on ``clock``; None: every run is in time.
    """

    def __init__(
        self,
        slots: int,
        devices: int,
        deadline: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.free = set(range(slots))
        self.devices = [Device() for _ in range(devices)]
        self.deadline = deadline
        self._clock = clock
        self._now = clock()
        self._known: list[tuple[float, int]] = []

    def needs(self, tokens: int, alone: float, before: float = 0.0) -> float:
        """Seconds of a device for a run on so many tokens.

        alone: what it would take alone on the clock, until one is known. before: seconds of a
        device that earlier starts had.
        """
        whole = alone / NO_SLOWER
        if self._known:
            seconds, known = map(sum, zip(*self._known, strict=True))
            whole = seconds / known * tokens
        return max(whole - before, STARTING * whole)

    def slot(self) -> int:
        """A free one, on the device with the fewest runs."""
        return min(sorted(self.free), key=lambda slot: len(self._device(slot).turns))

    def in_time(self, slot: int, seconds: float) -> bool:
        """Whether a run that begins there now, and all beside it, would be done by the deadline."""
        if self.deadline is None:
            return True
        self._advance()
        return self._now + self._device(slot).lasts(seconds) <= self.deadline

    def begin(self, slot: int, seconds: float) -> None:
        """A run that needs so many seconds of a device begins."""
        self._advance()
        self.free.remove(slot)
        self._device(slot).turns[slot] = Turn(seconds)

    def end(self, slot: int) -> Turn:
        """It is over."""
        self._advance()
        self.free.add(slot)
        return self._device(slot).turns.pop(slot)

    def learn(self, turn: Turn, tokens: int) -> None:
        """A run was made from its beginning: what others need is known from it, by the token."""
        self._known.append((turn.had, tokens))

    def _device(self, slot: int) -> Device:
        return self.devices[slot % len(self.devices)]

    def _advance(self) -> None:
        now = self._clock()
        for device in self.devices:
            device.advance(now - self._now)
        self._now = now
