"""Keeping weights at log-spaced steps, and the full state that a resume starts from."""

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from data.files import naming, sync, sync_folder
from data.module import TokenDataModule
from kernels.errors import UserError
from models.batch import PackedBatch
from models.checkpoints import save_model
from train.callbacks.sink_monitor import SinkMonitor
from train.callbacks.step_callback import StepCallback
from train.callbacks.stopping import Stopping
from train.going_on import start_from_weights
from train.module import PretrainModule
from train.run_folder import RunFolder, stored_run_id
from train.sharding import whole_state
from train.tracking import TrackingConfig, checkpoint_steps


class CheckpointSchedule(StepCallback, Checkpoint):
    """``checkpoints/step_00000128/`` at the steps of ``checkpoint_steps``; all are kept.

    ``last.ckpt`` is replaced every ``tracking.last_every`` steps, at the end, and where a signal
    stops the run; it names the run it is of.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        max_steps: int,
        sink_monitor: SinkMonitor | None,
        stopping: Stopping | None = None,
        run_id: str | None = None,
    ):
        self.config = config
        self.folder = folder
        self.max_steps = max_steps
        self.sink_monitor = sink_monitor
        self.stopping = stopping
        self.run_id = run_id
        self.steps = set(checkpoint_steps(config, max_steps))

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        if trainer.global_step == 0:
            self.keep(trainer, pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        step = trainer.global_step
        if step in self.steps:
            self.keep(trainer, pl_module)
        is_last = self.stopping is not None and self.stopping.due
        if step % self.config.last_every == 0 or step == self.max_steps or is_last:
            self.save_state(trainer, pl_module)
        if is_last:
            self.stopping.stop(step)

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def keep(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        """Write the weights as of now, rank 0 only; the others help to put them together."""
        with pl_module.outside_training():
            weights = whole_state(pl_module.decoder)
            if trainer.is_global_zero:
                save_model(pl_module.decoder, self.folder.checkpoint(trainer.global_step), weights)

    def save_state(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        """Replace last.ckpt; what was recorded before it is on disk first."""
        with pl_module.outside_training():
            if self.sink_monitor is not None:
                self.sink_monitor.flush()
            temporary = self.folder.unfinished_last
            try:
                trainer.save_checkpoint(temporary, weights_only=False)
                if trainer.is_global_zero:
                    temporary.replace(self.folder.last)
                    sync_folder(self.folder.last.parent)
            except OSError:
                # On a full disk, its room is what the next start needs.
                temporary.unlink(missing_ok=True)
                raise


class StateFileIO(TorchCheckpointIO):
    """Writes a state where it is to lie, to the disk. Lightning's own way is through $TMPDIR."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # The writer's complaint about what a failed write left.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            sync(file)


class RandomState(L.Callback):
    """Carries the generators' states over a resume; Lightning's checkpoints have none."""

    def __init__(self):
        self._restored: dict[str, Any] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        # As late as this, because building the data loader draws from the generators too.
        state, self._restored = self._restored, None
        if state is None:
            return
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"][0])
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, key, *rest = state["numpy"]
        np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))

    def state_dict(self) -> dict[str, Any]:
        # Lists and tensors only, so that the file loads without executing anything.
        version, words, gauss = random.getstate()
        name, key, *rest = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            # This rank's device alone; asking the others would start a context on each.
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
            "python": [version, list(words), gauss],
            "numpy": [name, key.tolist(), *rest],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


def is_finished(folder: RunFolder, max_steps: int) -> bool:
    """Whether a run has made all its steps and kept what came of them.

    The weights of the last step alone don't tell: last.ckpt follows them, with the tables.
    """
    if not folder.last.exists() or not folder.checkpoint(max_steps).is_dir():
        return False
    try:
        # Mapped, so that no weight is read.
        state = torch.load(folder.last, map_location="cpu", weights_only=True, mmap=True)
        return int(state["global_step"]) >= max_steps
    except Exception:
        # ``check_state_file`` says what is wrong with it.
        return False


def check_state_file(folder: RunFolder, pl_module: PretrainModule, data: TokenDataModule) -> int:
    """The step of last.ckpt.

    Raises UserError unless it can be read safely, is this run's, and fits the model and the data.
    """
    path = folder.last
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, weights = int(state["global_step"]), state["state_dict"]
        data_state = state[type(data).__qualname__]
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except Exception as error:
        from_weights = start_from_weights(folder)
        or_from_weights = "" if from_weights is None else f", or {from_weights}"
        raise UserError(
            "run_dir must hold an intact checkpoint to resume, got one that is damaged or no run's "
            f"state: {path}. The same settings with a new run_dir begin again{or_from_weights}"
        ) from error
    whose = state.get("callbacks", {}).get(CheckpointSchedule.__qualname__, {}).get("run_id")
    ours = stored_run_id(folder)
    if None not in (whose, ours) and whose != ours:
        raise UserError(
            f"run_dir must hold the checkpoint of its own run {ours} to resume, got one of run "
            f"{whose} in {path}"
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in pl_module.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"run_dir must hold a checkpoint of this model to resume ({name} is "
                f"{found.get(name)} there, {wanted.get(name)} here), got {path}"
            )
    data.load_state_dict(data_state)
    return step
