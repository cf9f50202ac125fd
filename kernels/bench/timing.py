"""Time calls side by side: bursts in turn, round by round, so all meet the same clocks and heat.

A call is made once before each burst's clock starts: the device is then busy while the host queues
the burst, and neither the launch nor what the caches held before is counted. The order within a
round is shuffled (seeded), so that nobody always follows the same neighbour.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

WARM_UP_CALLS = 2
"""Calls before anything is timed or captured: compilation, handles, workspaces."""

MAX_BURST = 200
"""Calls in a burst, at most."""


class Clock(Protocol):
    """Marks a moment on the device's time line, and tells two marks' distance."""

    def mark(self) -> Any:
        """This moment, after all work queued so far."""

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Time between two marks; waits until both have passed."""


class CudaClock:
    """Events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        """An event behind all work queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Device time between two events, in milliseconds."""
        stop.synchronize()
        return start.elapsed_time(stop)


class HostClock:
    """The process's own time, for machines without a GPU."""

    def mark(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def milliseconds(self, start: float, stop: float) -> float:
        """Between two marks."""
        return 1000 * (stop - start)


class Timing(NamedTuple):
    """Milliseconds a call over the rounds: median, and distance between the quartiles."""

    median: float
    spread: float


def interleaved(
    calls: Sequence[tuple[str, Callable[[], object]]],
    *,
    clock: Clock,
    rounds: int = 20,
    burst_ms: float = 5.0,
    burst_calls: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time each call, by its name.

    rounds: bursts of each call, at least 2. burst_ms: how long a burst should last; a call that
    takes longer is a burst. burst_calls: calls in a burst of those named, whatever they take, for
    calls of which every n-th does more; such calls are taken to be warm.
    """
    lengths = dict(burst_calls or {})
    for name, call in calls:
        if name in lengths:
            continue
        for _ in range(WARM_UP_CALLS):
            call()
        start = clock.mark()
        for _ in range(WARM_UP_CALLS):
            call()
        each = clock.milliseconds(start, clock.mark()) / WARM_UP_CALLS
        lengths[name] = max(1, min(MAX_BURST, round(burst_ms / max(each, 1e-6))))

    samples: dict[str, list[float]] = {name: [] for name, _ in calls}
    order = list(calls)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        marks = []
        for name, call in order:
            call()
            start = clock.mark()
            for _ in range(lengths[name]):
                call()
            marks.append((name, start, clock.mark()))
        # Read at the end of a round: waiting after every burst would let the device idle and cool.
        for name, start, stop in marks:
            samples[name].append(clock.milliseconds(start, stop) / lengths[name])
    return {name: _timing(times) for name, times in samples.items()}


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, high - low)


class Captured:
    """A call recorded in a CUDA graph, so that replaying it costs the host next to nothing.

    The current stream must not be the default one, and whatever the call's backward passes go
    through must have been made on it: autograd runs a backward step on its forward's stream.
    Raises whatever the call raises where it can't be captured.
    """

    def __init__(self, call: Callable[[], object]):
        for _ in range(WARM_UP_CALLS):
            call()
        # Kept: the graph reads tensors that only the call refers to.
        self._call = call
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            call()

    def __call__(self) -> None:
        self._graph.replay()
