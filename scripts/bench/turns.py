"""A training run that waits for its turn: ``train.run.run`` in a thread, step by step.

Contenders of a bench take turns, but a trainer has one loop that runs to its end. So each run has a
thread of its own, and a callback that blocks before a step until the bench allows it.
"""

import io
import threading
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from queue import Queue
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from models.batch import PackedBatch
from scripts.bench.split import Split
from train.config import RunConfig
from train.module import PretrainModule
from train.run import run


@dataclass(frozen=True)
class GlobalSettings:
    """PyTorch's settings that are the whole process's, though each contender has its own."""

    deterministic: bool
    warn_only: bool
    matmul_precision: str
    cudnn_benchmark: bool
    fills_new_memory: bool

    @classmethod
    def now(cls) -> "GlobalSettings":
        """Those in force."""
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    def apply(self) -> None:
        """Put them in force."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.utils.deterministic.fill_uninitialized_memory = self.fills_new_memory


class Ended(NamedTuple):
    """A run's last word: what it raised, if anything."""

    error: BaseException | None


class TurnTaking(L.Callback):
    """Blocks before an optimizer step unless the bench has allowed it.

    allowed: numbers of steps to make, 0 to end the fit. waiting: gets None whenever the run waits,
    and ``Ended`` when it doesn't any more. batch: the micro-batch to come. losses: while a list,
    gets the loss of every step, a scalar on the device; it is of the step's whole batch.
    """

    def __init__(self):
        self.allowed: Queue[int] = Queue()
        self.waiting: Queue[Ended | None] = Queue()
        self.losses: list[Tensor] | None = None
        self.split: Split | None = None
        self._left = 0
        self._last_step = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        self._mark("data")
        if trainer.global_step == self._last_step or trainer.should_stop:
            # Another micro-batch of the same step, or the one after which the fit ends.
            return
        self._last_step = trainer.global_step
        self.trainer, self.module, self.batch = trainer, pl_module, batch
        if self._left == 0:
            self.waiting.put(None)
            self._left = self.allowed.get()
            trainer.should_stop = self._left == 0
            if self.split is not None:
                self.split.start(trainer)
        self._left -= 1
        if self.losses is not None:
            self.losses.append(torch.zeros((), device=pl_module.device))

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: PretrainModule, optimizer) -> None:
        self._mark("forward")

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: PretrainModule, loss: Tensor
    ) -> None:
        # Gradients are zeroed before a step's first backward pass only.
        first = self.split is not None and self.split.last == "forward"
        self._mark("optimizer" if first else "forward")
        if self.losses:
            self.losses[-1] += loss.detach()

    def on_after_backward(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self._mark("backward")

    def _mark(self, part: str) -> None:
        if self.split is not None:
            self.split.mark(part)


class Fit:
    """A run of ``train.run.run`` that makes steps when told; the caller's thread waits meanwhile.

    What the run prints is swallowed. Whatever it raises is raised by the call during which it was.
    """

    def __init__(self, config: RunConfig, settings: dict, vocab_size: int | None):
        self.config = config
        self.turns = TurnTaking()
        self.seconds_to_first_step = 0.0
        self.is_waiting = False
        """Whether the run stands before a step."""
        arguments = {"settings": settings, "vocab_size": vocab_size, "callbacks": [self.turns]}
        self._thread = threading.Thread(target=self._run, kwargs=arguments, daemon=True)

    def _run(self, **arguments: Any) -> None:
        error = None
        try:
            run(self.config, experiment="bench", overrides=[], **arguments)
        except BaseException as caught:
            error = caught
        self.turns.waiting.put(Ended(error))

    def start(self) -> None:
        """Run up to the first step, which is not made yet."""
        start = time.perf_counter()
        self._thread.start()
        self._wait()
        self.global_settings = GlobalSettings.now()
        self.seconds_to_first_step = time.perf_counter() - start

    def steps(self, number: int = 1) -> None:
        """Make this many optimizer steps."""
        self.turns.allowed.put(number)
        self._wait()
        if not self.is_waiting:
            raise AssertionError("the run ended by itself")

    def losses(self, number: int) -> list[float]:
        """Make steps and return the loss of each, nats a label."""
        self.turns.losses = []
        self.steps(number)
        losses, self.turns.losses = self.turns.losses, None
        return torch.stack(losses).tolist()

    def split(self, number: int, split: Split) -> dict[str, float]:
        """Make steps and return what the parts of one took, in milliseconds."""
        self.turns.split = split
        self.steps(number)
        self.turns.split = None
        split.stop(self.turns.trainer)
        return split.milliseconds(number)

    def stop(self) -> None:
        """End the run, if it hasn't ended."""
        if self.is_waiting:
            self.turns.allowed.put(0)
            self._wait()
        self._thread.join()

    def _wait(self) -> None:
        with redirect_stdout(io.StringIO()):
            message = self.turns.waiting.get()
        self.is_waiting = message is None
        if message is not None and message.error is not None:
            raise message.error

    @property
    def module(self) -> PretrainModule:
        """The module in training."""
        return self.turns.module

    def tensors(self) -> list[Tensor]:
        """All that the run keeps on the device from step to step, but for gradients and sums."""
        optimizer = self.turns.trainer.optimizers[0]
        return [*self.module.parameters(), *state_tensors(optimizer)]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state, its parts' where it has parts."""
    parts = getattr(optimizer, "parts", (optimizer,))
    states = [state for part in parts for state in part.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
