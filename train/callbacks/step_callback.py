"""The base of callbacks that act after micro-batches, or once a step however many it has."""

from typing import Any

import lightning as L

from models.batch import PackedBatch
from train.module import PretrainModule


class StepCallback(L.Callback):
    """Calls ``after_micro_batch`` after each, and ``after_step`` once the update is made too, with
    the step's last micro-batch. A subclass overrides what it needs.
    """

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PretrainModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        self.after_micro_batch(trainer, pl_module, batch)
        if pl_module.finished_step:
            self.after_step(trainer, pl_module, batch)

    def after_micro_batch(
        self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch
    ) -> None:
        """Called while the micro-batch's gradients and statistics are still there."""

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        """Called when ``trainer.global_step`` counts the finished step."""
