"""Where a training step's time goes, by marks at the trainer's hooks."""

from typing import Any

import lightning as L

from kernels.bench.timing import Clock
from train.callbacks.sink_monitor import SinkMonitor

PARTS = ("data", "forward", "backward", "optimizer", "statistics", "logging")
"""data: what the step waits for its rows; optimizer: zeroing, clipping, update, learning rate;
statistics: the sink monitor, what the attention kernel does for them is in forward and backward;
logging: every other callback."""


class Split:
    """Charges the time between two marks to the part that the later one names.

    On a GPU the marks are events, so what is told is the device's time, its waiting for the host
    included.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self.marks: list[tuple[str, Any]] = []

    @property
    def last(self) -> str:
        """The part that the latest mark ended."""
        return self.marks[-1][0]

    def mark(self, part: str) -> None:
        """What was done since the last mark was ``part``."""
        self.marks.append((part, self.clock.mark()))

    def start(self, trainer: L.Trainer) -> None:
        """Begin with the next thing done; callbacks tell apart statistics and logging."""
        self.marks = [("", self.clock.mark())]
        for index, callback in enumerate(trainer.callbacks):
            self._watch(callback, is_first=index == 0)

    def _watch(self, callback: L.Callback, *, is_first: bool) -> None:
        part = "statistics" if isinstance(callback, SinkMonitor) else "logging"
        own = callback.on_train_batch_end

        def on_train_batch_end(*arguments: Any) -> None:
            if is_first:
                # The update is the last thing before the first callback.
                self.mark("optimizer")
            own(*arguments)
            self.mark(part)

        callback.on_train_batch_end = on_train_batch_end

    def stop(self, trainer: L.Trainer) -> None:
        """Leave the callbacks as they were."""
        for callback in trainer.callbacks:
            del callback.on_train_batch_end

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Milliseconds a step, by part."""
        total = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, stop) in zip(self.marks, self.marks[1:], strict=False):
            total[part] += self.clock.milliseconds(start, stop)
        return {part: spent / steps for part, spent in total.items()}
