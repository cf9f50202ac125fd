"""Where a run's numbers go: ``metrics.csv`` in its folder, and W&B."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from data.files import naming, write_atomically
from train.run_folder import arm_hash, arm_name
from train.wandb_mode import LoggerConfig
from train.wandb_names import LAYERS, wandb_key
from train.wandb_service import (
    FINISH_SECONDS,
    LEAVE_SECONDS,
    STOP_SECONDS,
    start_wandb,
    told,
    warn,
    within,
)


class MetricsCSV(Logger):
    """One row a logged step in ``metrics.csv``; survives kills and continues after a resume.

    Rows are flushed as they are logged. A metric that appears later adds a column, which rewrites
    the file atomically; missing values are empty.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml has them."""

    def keep_until(self, step: int) -> None:
        """Forget every row after ``step``, and a torn last line: a resume writes them again."""
        self._rows, self._columns = [], []
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or [])
            for row in reader:
                whole = None not in row.values() and None not in row
                if whole and row["step"].isdigit() and int(row["step"]) <= step:
                    self._rows.append(row)
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step)} | {name: repr(value) for name, value in metrics.items()}
        self._rows.append(row)
        new = [name for name in row if name not in set(self._columns)]
        if new:
            self._columns += new
            self._rewrite()
        else:
            with naming(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path, text.getvalue().encode())


class WandbRun(WandbLogger):
    """Writes rows to a W&B run, under the names of ``train.wandb_names``.

    W&B's own step is the training step, and ``step`` and ``tokens`` are in every row as axes. A row
    is sent when it is logged, but for that of ``last_step``, which the figures of the end join.
    """

    def __init__(self, run: Any, project: str, last_step: int, everything: bool):
        super().__init__(project=project, experiment=run)
        self.last_step = last_step
        self.everything = everything
        self._sections: set[str] = set()
        self._is_lost = False
        with self._surviving():
            # Hidden: an axis needs no panel of its own.
            run.define_metric("step", hidden=True)
            run.define_metric("tokens", step_metric="step", hidden=True)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Whatever W&B raises in here is a warning, the first time; the run doesn't need it."""
        try:
            yield
        except Exception as error:
            if not self._is_lost:
                self._is_lost = True
                warn(f"W&B is gone ({told(error)}); training goes on, metrics.csv has every row")
                # Or it would wait for its service when this process ends.
                with suppress(Exception):
                    within(LEAVE_SECONDS, wandb.teardown)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self._is_lost:
            return
        with self._surviving():
            self._log(metrics, step)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        named = {wandb_key(name, everything=self.everything): v for name, v in metrics.items()}
        named.pop(None, None)
        self._define_sections(named)
        self.experiment.log({"step": step} | named, step=step, commit=step < self.last_step)

    def _define_sections(self, names: Iterable[str]) -> None:
        # One by one, because W&B takes either of two patterns that fit a name.
        found = {name.split("/")[0] for name in names if "/" in name}
        for section in sorted(found - self._sections):
            self._sections.add(section)
            # By layer, the table of runs would have hundreds of columns.
            summary = "none" if section == LAYERS else None
            self.experiment.define_metric(f"{section}/*", step_metric="step", summary=summary)

    @rank_zero_only
    def log_figures(self, figures: dict[str, Any], step: int) -> None:
        """Pictures by key, in the row of ``step``, which must not be logged yet unless it is the
        last one's. A picture is a file's path or an array [height, width, 4] of bytes."""
        if self._is_lost:
            return
        with self._surviving():
            self._define_sections(figures)
            images = {key: wandb.Image(picture) for key, picture in figures.items()}
            self.experiment.log(images, step=step, commit=False)

    @rank_zero_only
    def leave(self) -> None:
        """Finish as failed, in ``STOP_SECONDS`` at most: somebody waits for the run to stop."""
        if not self._is_lost:
            with suppress(Exception):
                within(STOP_SECONDS, lambda: self.experiment.finish(exit_code=1))

    @rank_zero_only
    def finish(self) -> None:
        """Hand over what is left, for ``FINISH_SECONDS`` at most."""
        if self._is_lost:
            return
        with self._surviving():
            within(FINISH_SECONDS + LEAVE_SECONDS, self.experiment.finish)


def build_wandb_logger(
    config: LoggerConfig,
    mode: str,
    run_dir: Path,
    run_id: str,
    settings: dict,
    measured: dict,
    *,
    experiment: str,
    overrides: list[str],
) -> WandbRun | None:
    """W&B's logger, None where ``mode`` (of ``train.wandb_mode``) is disabled.

    ``run_id`` stays the same over resumes, so that ``wandb sync`` merges their offline runs; an
    agent's run has the id that its sweep waits for. The runs of an arm share their group, the hash
    of their settings without the seeds, and ``arm`` in the config. measured: what the config shows
    beside the settings.
    """
    if mode == "disabled":
        return None
    # An empty variable means unset to a shell user but is an error to W&B.
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]
    # The run says itself where things are; W&B's own lines would run through the table.
    os.environ.setdefault("WANDB_SILENT", "true")
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    names = {"arm": arm_name(experiment, overrides), "experiment": experiment}
    described = {
        "project": config.project,
        "name": run_dir.name,
        "id": os.environ.get("WANDB_RUN_ID", run_id) if in_sweep else run_id,
        "group": arm_hash(settings),
        "job_type": experiment,
        "config": settings | measured | names,
        "dir": str(run_dir),
        # A run that failed in a sweep of Hydra's doesn't get the next one's rows.
        "reinit": "finish_previous",
    }
    run = start_wandb(described, mode)
    if run is None:
        return None
    return WandbRun(run, config.project, settings["trainer"]["max_steps"], config.everything)
