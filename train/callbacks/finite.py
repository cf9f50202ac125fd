"""Stops a run whose loss or gradients are no numbers any more, before anything of it is kept."""

import lightning as L

from models.batch import PackedBatch
from train.callbacks.step_callback import StepCallback
from train.callbacks.stopping import Stopping
from train.going_on import newest_weights, start_from_weights
from train.mistakes import KnownToAll
from train.module import PretrainModule
from train.run_folder import RunFolder
from train.tracking import TrackingConfig, checkpoint_steps


class FiniteCheck(StepCallback):
    """Reads the module's flag at steps that log or keep something, so no other step waits for it.

    Raises ``UserError``, on all ranks, naming the first bad step, its rows of the stream and what
    is kept from before it. Must run before the callbacks that write.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        max_steps: int,
        rows_per_step: int,
        stopping: Stopping | None = None,
    ):
        self.config = config
        self.folder = folder
        self.max_steps = max_steps
        self.rows_per_step = rows_per_step
        self.stopping = stopping
        self.steps = set(checkpoint_steps(config, max_steps))

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        is_last = self.stopping is not None and self.stopping.due
        if is_last or self._is_due(trainer.global_step):
            self.check(int(pl_module.first_bad_step))

    def _is_due(self, step: int) -> bool:
        config = self.config
        often = (config.log_every, config.sinks_every, config.validate_every, config.last_every)
        return step in self.steps or step == self.max_steps or any(step % n == 0 for n in often)

    def check(self, bad_step: int) -> None:
        """Raise for a bad step, from 1; 0 is none."""
        if bad_step == 0:
            return
        rows = f"{(bad_step - 1) * self.rows_per_step} to {bad_step * self.rows_per_step - 1}"
        kept = newest_weights(self.folder)
        last = "no weights were kept" if kept is None else f"{kept} has the last weights kept"
        # Not from the last: they may be of the way there already.
        start = f"init_from={self.folder.path}@STEP starts one from weights of before it diverged"
        branch = "" if start_from_weights(self.folder) is None else f" ({start})"
        # The norm is over the gradients of all ranks, so all stop here.
        raise KnownToAll(
            f"training stopped: NaN or infinity in the loss or gradients of step {bad_step}, rows "
            f"{rows} of the stream; {last}. A lower optimizer.lr or longer schedule.warmup_steps "
            f"may help, but can't change when a run is resumed: start a new run{branch}"
        )
