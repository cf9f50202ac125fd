"""All callbacks of a run, in the order in which they must run."""

import lightning as L
from rich.console import Console

from data.module import TokenDataModule
from kernels.attention import StatisticsLevel
from train.callbacks.checkpoints import CheckpointSchedule, RandomState
from train.callbacks.finite import FiniteCheck
from train.callbacks.head_maps import HeadMaps
from train.callbacks.progress import ProgressDisplay
from train.callbacks.recording import RowWriter, ThroughputMonitor, Validation
from train.callbacks.sink_monitor import SinkMonitor
from train.callbacks.stopping import Stopping
from train.config import RunConfig
from train.loggers import WandbRun
from train.run_folder import RunFolder


class RunCallbacks:
    """``ordered``: measure, write the row, then checkpoint; ``validation`` and ``rows`` among them.

    wandb_logger, run_id: None where there is none, as on all ranks but the first. began: when the
    run did, as ``time.perf_counter`` tells it. brief: less of what one sees.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TokenDataModule,
        folder: RunFolder,
        console: Console,
        wandb_logger: WandbRun | None,
        stopping: Stopping,
        run_id: str | None,
        began: float,
        brief: bool = False,
    ):
        tracking, max_steps = config.tracking, config.trainer.max_steps
        sinks = None
        if tracking.statistics is not StatisticsLevel.off:
            sinks = SinkMonitor(tracking, folder.sinks, config.model.num_layers)
        self.validation = Validation(tracking, data, max_steps)
        self.rows = RowWriter(tracking, data)
        callbacks = [
            RandomState(),
            stopping,
            FiniteCheck(tracking, folder, max_steps, config.packing.batch_rows, stopping),
            sinks,
            ThroughputMonitor(tracking, config.packing.context),
            self.validation,
            None if wandb_logger is None else HeadMaps(self.validation, wandb_logger),
            self.rows,
            CheckpointSchedule(tracking, folder, max_steps, sinks, stopping, run_id),
            ProgressDisplay(console, self.rows, max_steps, began=began, brief=brief)
            if config.trainer.progress
            else None,
        ]
        self.ordered: list[L.Callback] = [c for c in callbacks if c is not None]
