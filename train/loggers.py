"""Where a run's numbers go: ``metrics.csv`` in its folder, and W&B."""

import csv
import io
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from data.files import write_atomically
from kernels.errors import require


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class LoggerConfig:
    """Logging besides the run folder."""

    wandb: WandbMode = WandbMode.auto
    """auto = $WANDB_MODE if set; else online when logged in, offline when not. Never asks."""
    project: str = "sinklab"
    """W&B project."""


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
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path, text.getvalue().encode())


def wandb_mode(config: LoggerConfig) -> str:
    """The mode W&B runs in, decided without ever waiting for input.

    Raises UserError for an unknown ``$WANDB_MODE``, and for online without a login.
    """
    setting, mode = "logger.wandb", config.wandb.value
    if config.wandb is WandbMode.auto and (variable := os.environ.get("WANDB_MODE")):
        setting, mode = "WANDB_MODE", variable
    known = [choice.value for choice in WandbMode if choice is not WandbMode.auto]
    if mode in ("disabled", "offline"):
        return mode
    require(mode in ("auto", "online"), setting, f"must be one of {', '.join(known)}", mode)
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error:
        logged_in = False
    require(logged_in or mode == "auto", setting, "must not be online without a login", mode)
    return "online" if logged_in else "offline"


def build_wandb_logger(
    config: LoggerConfig, mode: str, run_dir: Path, run_id: str, settings: dict
) -> WandbLogger | None:
    """W&B's logger, None where ``mode`` (of ``wandb_mode``) is disabled.

    ``run_id`` stays the same over resumes, so that ``wandb sync`` merges their offline runs.
    """
    if mode == "disabled":
        return None
    # An empty variable means unset to a shell user but is an error to W&B.
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]
    # The run says itself where things are; W&B's own lines would run through the table.
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = WandbLogger(
        project=config.project,
        name=run_dir.name,
        id=run_id,
        save_dir=str(run_dir),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(console="off", silent=True),
    )
    # Lightning names it even unset, and W&B warns of the name.
    logger._wandb_init.pop("anonymous", None)
    logger.log_hyperparams(settings)
    return logger
