"""Callbacks that measure a step and write its row; their order in the trainer is the order here."""

import time

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput

from data.module import TokenDataModule
from models.batch import PackedBatch
from models.decoder import Decoder
from train.callbacks.step_callback import StepCallback
from train.devices import peak_flops
from train.evaluation import Evaluation, evaluate
from train.module import PretrainModule
from train.probes import ProbeInputs
from train.probes.in_training import probe_metrics
from train.probes.inputs import probe_inputs
from train.tracking import TrackingConfig


def flops_per_token(decoder: Decoder, context: int) -> int:
    """Model FLOP of a trained token: 6 N + 6 L T d_attention.

    N: all parameters but the input embedding, the unembedding at its unpadded size (tied or not);
    d_attention: query heads times head dim; the causal half of the scores. Nothing recomputed
    counts.
    """
    config = decoder.config
    weights = decoder.num_parameters().non_embedding + decoder.vocab_size * config.d_model
    attention = config.num_layers * context * config.num_heads * config.resolved_head_dim
    return 6 * weights + 6 * attention


class ThroughputMonitor(StepCallback):
    """``perf/tokens_per_second`` and, on a GPU whose peak is known, ``perf/mfu``.

    Means since the last record, all ranks together, waiting for data included, validation and
    checkpoints left out.
    """

    def __init__(self, config: TrackingConfig, context: int):
        self.config = config
        self.context = context

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.flops = flops_per_token(pl_module.decoder, self.context)
        peak = peak_flops(pl_module.device, _matmul_dtype(trainer))
        self.throughput = Throughput(
            available_flops=peak and peak * trainer.world_size,
            window_size=self.config.log_every + 1,
        )
        self.first_step, self.start = trainer.global_step, _training_seconds(pl_module)
        self.throughput.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        steps = trainer.global_step - self.first_step
        tokens = steps * pl_module.tokens_per_step
        self.throughput.update(
            time=_training_seconds(pl_module) - self.start,
            batches=steps,
            samples=tokens,
            lengths=tokens,
            flops=pl_module.tokens_per_step * self.flops,
        )
        if trainer.global_step % self.config.log_every == 0:
            speed = self.throughput.compute()
            # Lightning calls device what it is told of: here, all ranks together.
            names = {"device/items_per_sec": "perf/tokens_per_second", "device/mfu": "perf/mfu"}
            pl_module.record({ours: speed[name] for name, ours in names.items() if name in speed})


def _training_seconds(pl_module: PretrainModule) -> float:
    return time.perf_counter() - pl_module.seconds_outside


def _matmul_dtype(trainer: L.Trainer) -> torch.dtype:
    return torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32


class Validation(StepCallback):
    """Held-out losses, sinks and ``tracking.probes`` every ``tracking.validate_every`` steps.

    The first and the last step are among them.

    A callback rather than Lightning's validation loop, because its figures must be written before
    the checkpoint of the same step: a resume from it then neither lacks nor repeats them.
    """

    def __init__(self, config: TrackingConfig, data: TokenDataModule, max_steps: int):
        self.config = config
        self.data = data
        self.max_steps = max_steps
        self.latest: Evaluation | None = None
        self._inputs: ProbeInputs | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        if trainer.global_step == 0:
            self.validate(pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        step = trainer.global_step
        if step % self.config.validate_every == 0 or step == self.max_steps:
            self.validate(pl_module)

    def validate(self, pl_module: PretrainModule) -> None:
        with pl_module.outside_training():
            self.latest = evaluate(
                pl_module.decoder,
                self.data,
                pl_module.device,
                self.config.probe_rows,
            )
            if self.config.probes:
                if self._inputs is None:
                    rows, device = self.config.probe_rows, pl_module.device
                    self._inputs = probe_inputs(self.data, rows=rows, device=device)
                metrics = probe_metrics(self.config.probes, pl_module.decoder, self._inputs)
                self.latest.metrics.update(metrics)
        pl_module.record(self.latest.metrics)


class RowWriter(StepCallback):
    """Adds loss, learning rate and what was seen of the data every ``tracking.log_every`` steps and
    at the end; sends rows off.
    """

    def __init__(self, config: TrackingConfig, data: TokenDataModule):
        self.config = config
        self.data = data
        self.latest: dict[str, float] = {}
        self.loss_step = -1
        """Step of the latest record of the loss."""

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.write(trainer, pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        due = trainer.global_step % self.config.log_every == 0
        if due or trainer.global_step == trainer.max_steps:
            # The sums go on after an odd last step, for a run that is resumed to be longer.
            pl_module.record(pl_module.losses(restart=due))
            self.loss_step = trainer.global_step
            pl_module.record(
                {"train/lr": pl_module.lr}
                | {f"data/{name}": x for name, x in self.data.seen(batch.cursor)._asdict().items()}
            )
        self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        if not pl_module.recorded:
            return
        row = {"tokens": pl_module.tokens, **pl_module.recorded}
        pl_module.recorded = {}
        self.latest |= row
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
