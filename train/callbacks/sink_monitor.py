"""Sinks of every layer and head during training: sums on the device, records every n steps."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from data.files import write_atomically
from models.batch import PackedBatch
from train.callbacks.step_callback import StepCallback
from train.config import Compile
from train.metrics import SinkSums, SinkTotals, layer_sums
from train.module import PretrainModule
from train.ranks import is_first, summed
from train.sink_table import sink_metrics, sink_tables
from train.step_metrics import StepPart, attention_metrics, norm_ratios, step_norms
from train.tracking import TrackingConfig

FLUSH_RECORDS = 50
"""Records kept in memory before they are written as a part of their own."""


class Record(NamedTuple):
    """The sums of the steps up to ``step``, on the CPU."""

    step: int
    tokens: int
    totals: SinkTotals


class SinkMonitor(StepCallback):
    """Sums the sink statistics over every row trained on and records them.

    After each micro-batch the statistics are reduced to small sums by layer and head on the device
    (``train.metrics``), without waiting for it; every ``tracking.sinks_every`` steps the sums
    become metrics by layer and rows of ``sinks/part-<step>.parquet`` by layer and head, and start
    again from zero. The sums are part of the checkpoint: a resumed run records what an
    uninterrupted one does.
    """

    def __init__(self, config: TrackingConfig, folder: Path, num_layers: int):
        self.config = config
        self.folder = folder
        self.totals = SinkTotals(num_layers)
        self.parts: list[StepPart] = []
        self.records: list[Record] = []
        self.alpha_kind = ""
        self.sums_of = layer_sums

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.alpha_kind = pl_module.decoder.alpha_kind
        if pl_module.compiled is not Compile.nothing and pl_module.device.type == "cuda":
            # Some two hundred small kernels a micro-batch otherwise.
            self.sums_of = torch.compile(layer_sums, dynamic=False)
        # Sums from a checkpoint come back on the CPU; they are those of all ranks.
        share = 1 if is_first() else 0
        for kind, sums in self.totals.sums.items():
            self.totals.sums[kind] = sums.map(lambda value: share * value.to(pl_module.device))

    def after_micro_batch(
        self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch
    ) -> None:
        statistics = [
            record.statistics._replace(key_mass_BHS=tap.grad)
            for record, tap in zip(pl_module.layers, pl_module.key_mass_taps, strict=True)
        ]
        masks = pl_module.decoder.layer_masks(batch.mask)
        positions = self.config.positions
        self.totals.add(statistics, masks, batch.begins_BT, positions, sums_of=self.sums_of)
        step = trainer.global_step + (not pl_module.finished_step)
        due = step % self.config.sinks_every == 0
        if not due and step != trainer.max_steps:
            return
        self.parts.append(StepPart(statistics, masks, step_norms(pl_module.layers), batch))
        if not pl_module.finished_step:
            return
        totals = self.totals.reduce(summed)
        if due:
            # After an odd last step the sums go on, for a run that is resumed to be longer.
            self.totals = SinkTotals(self.totals.num_layers)
        pl_module.record(sink_metrics(totals))
        pl_module.record(attention_metrics(self.parts))
        pl_module.record(norm_ratios(self.parts))
        self.parts = []
        if trainer.is_global_zero and totals.sums:
            self.records.append(Record(step, pl_module.tokens, totals))
            if len(self.records) >= FLUSH_RECORDS:
                self.flush()

    def flush(self) -> None:
        """Write the records in memory as the part that ends with the last one's step."""
        if not self.records:
            return
        steps, tokens, totals = zip(*self.records, strict=True)
        table = sink_tables(list(totals), self.alpha_kind)
        record = table.pop("record")
        table.insert(0, "step", record.map(dict(enumerate(steps))))
        table.insert(1, "tokens", record.map(dict(enumerate(tokens))))
        if not table.empty:
            content = io.BytesIO()
            table.to_parquet(content, index=False)
            name = f"part-{table['step'].max():08d}.parquet"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, content.getvalue())
        self.records = []

    def state_dict(self) -> dict[str, Any]:
        return {kind: vars(sums) for kind, sums in self.totals.reduce(summed).sums.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals.sums = {kind: SinkSums(**tensors) for kind, tensors in state_dict.items()}
