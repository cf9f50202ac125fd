"""Decides at the end of each step whether a signal ends the run there, on all ranks alike."""

import lightning as L
import torch
import torch.distributed

from models.batch import PackedBatch
from train.callbacks.step_callback import StepCallback
from train.module import PretrainModule
from train.run_folder import RunFolder
from train.stopping import StopSignals


class Stopping(StepCallback):
    """``due``: the signal for which this step is to be the run's last, 0 for none.

    Must run before the callbacks that read ``due``: those that save and, once they have, call
    ``stop``. Ranks agree without waiting for the device, over a group of their own on the CPU.
    """

    def __init__(self, signals: StopSignals, folder: RunFolder):
        self.signals = signals
        self.folder = folder
        self.due = 0
        self._group: torch.distributed.ProcessGroup | None = None

    def setup(self, trainer: L.Trainer, pl_module: PretrainModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.signals.deferring = True
        # Lightning has set its own by now, which would end a step between its micro-batches.
        self.signals.install()

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        self.due = self._agreed()

    def _agreed(self) -> int:
        if self._group is None:
            return self.signals.received
        number = torch.tensor(self.signals.received)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number)

    def stop(self, step: int) -> None:
        """End the run, all of which is on the disk up to ``step``: see ``StopSignals.let_go``."""
        number, self.due = self.due, 0
        self.signals.let_go(
            number,
            f"step {step} is saved in {self.folder.last}; the same command with resume=true and "
            f"run_dir={self.folder.path} goes on from there",
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.signals.deferring = False
        self.due = self._agreed()
        if self.due:
            self.stop(trainer.global_step)

    def on_exception(
        self, trainer: L.Trainer, pl_module: PretrainModule, exception: BaseException
    ) -> None:
        self.signals.deferring = False
