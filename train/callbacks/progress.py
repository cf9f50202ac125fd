"""What one sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import time

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.batch import PackedBatch
from train.callbacks.recording import RowWriter
from train.callbacks.step_callback import StepCallback
from train.config import Compile
from train.module import PretrainModule

LINES = 20
"""Lines printed over a run where there is no terminal, at most."""

FEW_LINES = 4
"""The same over one of a sweep's runs."""

SECONDS = 2.0
"""Between two of these lines, at least, but before the last."""


class ProgressDisplay(StepCallback):
    """Step, loss, tokens a second, and the first key's mass beside its uniform baseline.

    Reads the latest written row only, so it never waits for the device. began: when the run did, on
    the clock of ``time.perf_counter``; where training is compiled, a line tells how long after that
    the first step was made.
    """

    def __init__(
        self,
        console: Console,
        rows: RowWriter,
        max_steps: int,
        *,
        began: float,
        brief: bool = False,
    ):
        self.console = console
        self.began = began
        self.compiling = False
        self.rows = rows
        self.max_steps = max_steps
        self.num_lines = FEW_LINES if brief else LINES
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        if not trainer.is_global_zero:
            return
        self.lines_done = trainer.global_step * self.num_lines // self.max_steps
        self.start = self.last_line = time.perf_counter()
        self.compiling = pl_module.compiled is not Compile.nothing
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self.task = self.bar.add_task(
                "",
                total=self.max_steps,
                completed=trainer.global_step,
                figures="compiling" if self.compiling else "",
            )
            self.bar.start()

    def after_step(self, trainer: L.Trainer, pl_module: PretrainModule, batch: PackedBatch) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if self.compiling:
            self.compiling = False
            line = f"compiled: first step after {time.perf_counter() - self.began:.0f} s"
            self.console.print(line, highlight=False, soft_wrap=True)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=self.figures())
        elif self.rows.loss_step == step:
            # Between two records a line would repeat the figures of the last.
            self.print_line(step)

    def print_line(self, step: int) -> None:
        """Print the figures of ``step`` if a line is due."""
        now, lines = time.perf_counter(), step * self.num_lines // self.max_steps
        is_due = lines > self.lines_done and now - self.last_line >= SECONDS
        if is_due or step == self.max_steps:
            self.lines_done, self.last_line = lines, now
            line = f"step {step}/{self.max_steps}  {self.figures()}  {now - self.start:.0f} s"
            self.console.print(line, highlight=False, soft_wrap=True)

    def figures(self) -> str:
        """``loss 3.41 · sink 0.102 (uniform 0.074) · 51k tokens/s``, what there is of it."""
        row = self.rows.latest
        parts = []
        if "train/loss" in row:
            parts.append(f"loss {row['train/loss']:.3f}")
        if "sink/mass" in row:
            parts.append(f"sink {row['sink/mass']:.3f} (uniform {row['sink/baseline']:.3f})")
        if "perf/tokens_per_second" in row:
            parts.append(f"{row['perf/tokens_per_second'] / 1000:.1f}k tokens/s")
        return " · ".join(parts)

    def on_train_end(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        self.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: PretrainModule, exception: BaseException
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
