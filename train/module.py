"""The LightningModule: one micro-batch in, its share of the global batch's loss out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kernels.attention import StatisticsLevel
from models.batch import PackedBatch
from models.decoder import Decoder, LayerRecord
from train.config import Compile
from train.optimizers import OptimizerConfig, build_optimizer
from train.ranks import is_first, summed
from train.schedules import ScheduleConfig
from train.sharding import shard, whole


class PretrainModule(L.LightningModule):
    """Trains a decoder on packed rows.

    The loss of a micro-batch is its summed cross-entropy over the number of labelled tokens in the
    *whole* global batch, so that micro-batches and ranks with unequal numbers of labels give the
    gradient and the metrics of one big batch.

    For callbacks, of the last micro-batch: ``layers`` (the attention's statistics by layer) and
    ``key_mass_taps`` (whose gradients are the key mass by layer after the backward pass). Metrics
    gathered with ``record`` become one row of the loggers at the end of the step.

    compiled: what the compiler gets, as in ``trainer.compile``; never auto.
    """

    def __init__(
        self,
        decoder: Decoder,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        statistics: StatisticsLevel,
        tokens_per_step: int,
        compiled: Compile = Compile.nothing,
    ):
        super().__init__()
        self.decoder = decoder
        self.compiled = compiled
        # Rows are of one length, so nothing is to be compiled for any shape.
        self._compiled_loss = None
        if compiled is Compile.whole:
            self._compiled_loss = torch.compile(decoder.loss, dynamic=False)
            # DDP would have the graph cut where its buckets end.
            torch._dynamo.config.optimize_ddp = False
        elif compiled is Compile.blocks:
            for block in decoder.blocks:
                block.compile(dynamic=False)
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.total_steps = total_steps
        self.statistics = statistics
        self.tokens_per_step = tokens_per_step
        self.layers: tuple[LayerRecord, ...] = ()
        self.key_mass_taps: list[Tensor] = []
        self.recorded: dict[str, float] = {}
        # Loss and gradient norm since the last record: [loss sum, steps, gradient norm sum].
        self.register_buffer("loss_since_record", torch.zeros(3, dtype=torch.float64))
        # First step whose gradients were not finite, from 1; 0 for none. Read when logging.
        self.register_buffer("first_bad_step", torch.zeros((), dtype=torch.int64), persistent=False)
        # Of each rank its own: DDP would give all of them the first rank's.
        own = [name for name, _ in self.named_buffers(recurse=False)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)
        self.seconds_outside = 0.0
        self.lr = 0.0
        self._step_before = -1

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.decoder, self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint has the loss of all ranks; the first goes on from it, others from 0."""
        total = self.loss_since_record.clone()
        total[0] = summed(total[0])
        checkpoint["state_dict"]["loss_since_record"] = total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The first rank's share of the loss, and batches counted as this many ranks do."""
        if not is_first():
            checkpoint["state_dict"]["loss_since_record"][0] = 0
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        change = batches - progress["current"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts.update({name: n + change for name, n in counts.items()})

    def record(self, metrics: dict[str, float]) -> None:
        """Add metrics to the current step's row."""
        self.recorded |= metrics

    @contextmanager
    def outside_training(self) -> Iterator[None]:
        """Time spent in here (validation, checkpoints) is not the training's; nothing is compiled.

        A compiled block would be compiled for every shape and mask of the evaluation, seconds each,
        and beyond the compiler's limit of variants it would no more be compiled for training.
        """
        if self.device.type == "cuda":
            # Training steps still queued on the device are the training's.
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.seconds_outside += time.perf_counter() - start

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, all ranks: the rows' positions, padding included."""
        return self.trainer.global_step * self.tokens_per_step

    @property
    def finished_step(self) -> bool:
        """Whether the micro-batch just done was its step's last."""
        return self._step_before != self.trainer.global_step

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        self._step_before = self.trainer.global_step
        tracked = self.statistics is not StatisticsLevel.off
        self.key_mass_taps = self.decoder.key_mass_taps(batch) if tracked else []
        # Looked up now: FSDP puts a method of its own in the decoder's place for it.
        loss_of = self._compiled_loss or self.decoder.loss
        # The values of the micro-batch before needn't stay while these are made.
        self.layers = ()
        loss, self.layers = loss_of(
            batch, statistics=self.statistics, key_mass_taps=self.key_mass_taps or None
        )
        share = loss / batch.num_labels
        self.loss_since_record[0] += share.detach()
        # Lightning divides by the micro-batches and averages over ranks; the sum is what is meant.
        return share * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        # Lightning's own clipping refuses fused optimizers under mixed precision, because a
        # gradient scaler might be at work; bf16 has none.
        self.lr = optimizer.param_groups[0]["lr"]
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.optimizer_config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters(), self.optimizer_config.clip, norm
            )
        # A loss that is no number makes all gradients none. Fused AdamW then skips its update, on
        # the device; whatever another optimizer makes of it is never kept (``FiniteCheck``).
        norm = whole(norm)
        is_bad = ~norm.isfinite()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = is_bad.float()
        is_new = is_bad & (self.first_bad_step == 0)
        self.first_bad_step += is_new * (self.trainer.global_step + 1)
        self.loss_since_record[1] += 1
        self.loss_since_record[2] += norm

    def losses(self, *, restart: bool) -> dict[str, float]:
        """``train/loss`` and ``train/gradient_norm``, means over the steps since a restart."""
        total = summed(self.loss_since_record[0]).item()
        _, steps, norm = self.loss_since_record.tolist()
        if restart:
            self.loss_since_record.zero_()
        return {"train/loss": total / steps, "train/gradient_norm": norm / steps}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.decoder, self.optimizer_config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, self.total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
