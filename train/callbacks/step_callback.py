"""The base of callbacks that act once a step, however many micro-batches it has."""

from typing import Any

import lightning as L

from models.batch import PackedBatch
from train.module import PretrainModule


class StepCallback(L.Callback):
    """Calls ``after_step`` after the update, with the step's last micro-batch."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PretrainModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        if pl_module.finished_step:
            self.after_step(trainer, pl_module, batch)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        """What the callback does; ``trainer.global_step`` counts the finished step."""
        raise NotImplementedError
