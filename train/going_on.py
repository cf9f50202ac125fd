"""Going on with a run that ended before its time: what its folder has decides how."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from data.files import PARTIAL
from train.run_folder import RunFolder


def way_on(folder: RunFolder | None) -> str:
    """How to go on with the run in ``folder``, None for one that has none yet."""
    if folder is None or not folder.config.exists():
        return "nothing of the run is kept yet: the same command begins again"
    if folder.last.exists():
        return f"resume=true goes on from the last checkpoint, {folder.last}"
    begins = "there is no last.ckpt to go on from yet: resume=true begins again"
    from_weights = start_from_weights(folder)
    return begins if from_weights is None else f"{begins}, {from_weights}"


def start_from_weights(folder: RunFolder) -> str | None:
    """What ``init_from`` makes of the newest kept weights; None if all that is kept is step 0."""
    kept = newest_weights(folder)
    step = 0 if kept is None else _step_of(kept.name, "step_")
    if step == 0:
        return None
    return f"init_from={folder.path}@{step} with a new run_dir starts from the newest weights"


def newest_weights(folder: RunFolder) -> Path | None:
    """The folder of the last step whose weights are kept."""
    kept = folder.last.parent.glob("step_*")
    ours = [path for path in kept if _step_of(path.name, "step_") >= 0]
    # Names of equal length.
    return max(ours, default=None)


def drop_after(folder: RunFolder, step: int) -> None:
    """Delete what a run recorded after ``step`` (-1: everything): going on records it again.

    The rows of metrics.csv are its logger's matter (``MetricsCSV.keep_until``).
    """
    for part in folder.sinks.glob("part-*.parquet"):
        if _step_of(part.stem, "part-") > step:
            part.unlink()
    for table in folder.probes.glob("*/step_*.parquet"):
        if _step_of(table.stem, "step_") > step:
            table.unlink()
    for kept in folder.last.parent.glob("step_*"):
        if _step_of(kept.name, "step_") > step:
            shutil.rmtree(kept)
    # What a kill left half-written.
    for half in folder.last.parent.glob(".step_*"):
        shutil.rmtree(half)
    for half in (*folder.path.glob(f"*{PARTIAL}*"), *folder.sinks.glob(f"*{PARTIAL}*")):
        half.unlink()
    folder.unfinished_last.unlink(missing_ok=True)


def _step_of(name: str, prefix: str) -> int:
    """The step in a name of ours; -1 for a name that isn't, which is left alone."""
    match = re.fullmatch(prefix + r"(\d{8})", name)
    return int(match[1]) if match else -1
