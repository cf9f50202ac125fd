"""Pictures of the sinks by layer and head for W&B, at every validation."""

import lightning as L

from models.batch import PackedBatch
from train.callbacks.recording import Validation
from train.callbacks.step_callback import StepCallback
from train.evaluation import Evaluation
from train.figures import head_map_picture
from train.loggers import WandbRun
from train.module import PretrainModule
from train.wandb_names import heads_key


class HeadMaps(StepCallback):
    """``figures/heads_t64_text`` and ``..._bos_text``: alpha of the first key, layers x heads, on
    the 64-token prompts of ``probe/...``.

    Runs between ``validation`` and the writer of the row that the pictures become part of.
    """

    def __init__(self, validation: Validation, logger: WandbRun):
        self.validation = validation
        self.logger = logger
        self._drawn: Evaluation | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.draw(trainer, pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        """Draw the latest validation unless it has been drawn, rank 0 only."""
        latest = self.validation.latest
        if latest is None or latest is self._drawn or not trainer.is_global_zero:
            return
        self._drawn = latest
        step = trainer.global_step
        pictures = {}
        with pl_module.outside_training():
            for probe, totals in latest.probes.items():
                if "first" not in totals.sums:
                    continue
                sums = totals.sums["first"].map(lambda value: value.cpu())
                uniform = float(sums.baseline.sum() / sums.count.sum())
                words = {"text": "text", "bos_text": "BOS + text"}[probe]
                title = f"First key, T=64, {words}, step {step}"
                alpha_LH = (sums.alpha / sums.count).numpy()
                kind = pl_module.decoder.alpha_kind
                pictures[heads_key(probe)] = head_map_picture(alpha_LH, uniform, title, kind)
            if pictures:
                self.logger.log_figures(pictures, step)
