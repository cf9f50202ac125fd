"""Sinks of every layer and head during training: sums on the device, records every n steps."""

import io
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd

from models.batch import PackedBatch
from train.files import write_atomically
from train.metrics import SinkSums, SinkTotals
from train.module import PretrainModule
from train.norms import norm_ratios
from train.sink_table import attention_metrics, sink_metrics, sink_table
from train.tracking import TrackingConfig

FLUSH_RECORDS = 50
"""Records kept in memory before they are written as a part of their own."""


class SinkMonitor(L.Callback):
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
        self.records: list[pd.DataFrame] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        # Sums from a checkpoint come back on the CPU.
        for kind, sums in self.totals.sums.items():
            self.totals.sums[kind] = sums.map(lambda value: value.to(pl_module.device))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: PretrainModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        statistics = [
            record.statistics._replace(key_mass_BHS=tap.grad)
            for record, tap in zip(pl_module.layers, pl_module.key_mass_taps, strict=True)
        ]
        masks = pl_module.decoder.layer_masks(batch.mask)
        self.totals.add(statistics, masks, batch.begins_BT, self.config.positions)
        step = trainer.global_step
        if not pl_module.finished_step or step % self.config.sinks_every:
            return
        totals = self.totals.reduce(lambda v: trainer.strategy.reduce(v, reduce_op="sum"))
        self.totals = SinkTotals(self.totals.num_layers)
        pl_module.record(sink_metrics(totals))
        pl_module.record(attention_metrics(statistics, masks))
        pl_module.record(norm_ratios(pl_module.layers, batch))
        if trainer.is_global_zero:
            self.records.append(sink_table(totals).assign(step=step, tokens=pl_module.tokens))
            if len(self.records) >= FLUSH_RECORDS:
                self.flush()

    def flush(self) -> None:
        """Write the records in memory as the part that ends with the last one's step."""
        if not self.records:
            return
        table = pd.concat(self.records, ignore_index=True)
        columns = ["step", "tokens", *(c for c in table.columns if c not in ("step", "tokens"))]
        content = io.BytesIO()
        table[columns].to_parquet(content, index=False)
        name = f"part-{table['step'].max():08d}.parquet"
        write_atomically(self.folder / name, content.getvalue())
        self.records = []

    def state_dict(self) -> dict[str, Any]:
        return {kind: vars(sums.map(lambda v: v.cpu())) for kind, sums in self.totals.sums.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals.sums = {kind: SinkSums(**tensors) for kind, tensors in state_dict.items()}
