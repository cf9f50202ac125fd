"""How fast the runs of a campaign are that share devices, and which would still be done in time.

A run needs so many seconds of its device; of n at once each gets 1 / max(n, ``NO_SLOWER``) of the
time on the clock. What a run needs is known from those of its preset that ended, by the token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

NO_SLOWER = 3
"""So many at once are taken to be done as soon as one alone: while a run starts, is compiled and
probed, its device waits. An assumption: where it never waits, runs that are begun before one was
timed beside others may end too late."""

STARTING = 1 / 3
"""Share of a run that is taken to be made again by every start: starting, compiling, probing."""

OVERDUE = 0.1
"""Share of a run that is taken to be left of one that has had all that it was to need."""


class Size(NamedTuple):
    """What is known of a run before it is made.

    preset: those of one preset need as much a token. alone: seconds on the clock that it would take
    alone, until one was timed. before: seconds of a device that earlier starts had.
    """

    preset: str
    tokens: int
    alone: float
    before: float = 0.0


@dataclass
class Turn:
    """A run in its slot, in seconds. had: of its device; clock: since it began; cost: the same,
    shared out among the runs beside it."""

    size: Size
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

    def lasts(self, needs: Callable[[Size], float], new: Size) -> float:
        """On the clock, until all are done, if another began now."""
        left = [needs(new)]
        for turn in self.turns.values():
            whole = needs(turn.size)
            left.append(max(OVERDUE * whole, whole - turn.had))
        clock = done = 0.0
        for index, seconds in enumerate(sorted(left)):
            clock += (seconds - done) * max(len(left) - index, NO_SLOWER)
            done = seconds
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
        self._timed: dict[str, list[tuple[float, int]]] = {}

    def needs(self, size: Size) -> float:
        """Seconds of a device."""
        whole = size.alone / NO_SLOWER
        if timed := self._timed.get(size.preset):
            seconds, tokens = map(sum, zip(*timed, strict=True))
            whole = seconds / tokens * size.tokens
        return min(whole, max(0.0, whole - size.before) + STARTING * whole)

    def slots(self) -> list[int]:
        """A free one of each device that has one, the device with the fewest runs first."""
        first: dict[int, int] = {}
        for slot in sorted(self.free):
            first.setdefault(slot % len(self.devices), slot)
        return sorted(first.values(), key=lambda slot: len(self._device(slot).turns))

    def in_time(self, slot: int, size: Size) -> bool:
        """Whether a run that begins there now, and all beside it, would be done by the deadline."""
        if self.deadline is None:
            return True
        self._advance()
        return self._now + self._device(slot).lasts(self.needs, size) <= self.deadline

    def begin(self, slot: int, size: Size) -> None:
        """A run begins."""
        self._advance()
        self.free.remove(slot)
        self._device(slot).turns[slot] = Turn(size)

    def end(self, slot: int) -> Turn:
        """It is over."""
        self._advance()
        self.free.add(slot)
        return self._device(slot).turns.pop(slot)

    def learn(self, turn: Turn) -> None:
        """A run was made from its beginning: what others of its preset need is known from it."""
        self._timed.setdefault(turn.size.preset, []).append((turn.had, turn.size.tokens))

    def _device(self, slot: int) -> Device:
        return self.devices[slot % len(self.devices)]

    def _advance(self) -> None:
        now = self._clock()
        for device in self.devices:
            device.advance(now - self._now)
        self._now = now
