"""The folder a run leaves: its name, its provenance, and the rules for going on in it.

    runs/<experiment>/<name>/
        config.yaml         every setting, resolved
        provenance.json     commit, versions, device, seeds, command, data
        metrics.csv         one row a logged step
        sinks/              part-<step>.parquet: every layer and head
        checkpoints/        step_00000128/ (weights and model config), last.ckpt (training state)
        figures/            what was drawn from these files
        wandb/              the W&B run

``<name>`` is the overrides in readable form and eight hex digits of the settings' hash, seeds
included: equal settings mean the same folder, different ones never share it.
"""

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from data.files import write_atomically
from kernels.attention.fused.tiles import TABLE
from kernels.errors import UserError

NOT_THE_EXPERIMENT = ("run_dir", "cache_dir", "resume", "logger")
"""Settings that don't change what is computed, so they are left out of the hash."""

SEEDS = ("seed", "data_seed")
"""Settings in which the runs of an arm differ."""

MAY_CHANGE_ON_RESUME = ("trainer.max_steps", "trainer.progress", "trainer.num_workers")
"""Settings of the experiment that a resumed run may nevertheless change."""

PACKAGES = ("torch", "triton", "lightning", "hydra-core", "datasets", "tokenizers", "wandb")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def sinks(self) -> Path:
        return self.path / "sinks"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def unfinished_last(self) -> Path:
        return self.last.with_suffix(".tmp")

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}"


def experiment_hash(settings: dict) -> str:
    """Eight hex digits of everything in ``settings`` that decides what is computed."""
    kept = {name: value for name, value in settings.items() if name not in NOT_THE_EXPERIMENT}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def arm_hash(settings: dict) -> str:
    """Eight hex digits of ``settings`` without the seeds: equal for the runs of an arm."""
    return experiment_hash({name: v for name, v in settings.items() if name not in SEEDS})


def run_name(settings: dict, overrides: list[str]) -> str:
    """Readable overrides, then the hash: ``packing=document_seed=1-0a1b2c3d``."""
    return f"{_readable(overrides) or 'default'}-{experiment_hash(settings)}"


def arm_name(experiment: str, overrides: list[str]) -> str:
    """The arm in readable form, without seeds: ``packing=document``, ``gu60m/attention=gated``."""
    told = _readable(overrides, left_out=SEEDS)
    if experiment == "default":
        return told or experiment
    return f"{experiment}/{told}" if told else experiment


def _readable(overrides: list[str], left_out: tuple[str, ...] = ()) -> str:
    told = []
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        if name.split(".")[0] not in (*NOT_THE_EXPERIMENT, "experiment", *left_out):
            told.append(re.sub(r"[^A-Za-z0-9_.=+-]", "", f"{name.rsplit('.', 1)[-1]}={value}"))
    return "_".join(told)[:100]


def open_run_folder(
    settings: dict, experiment: str, overrides: list[str]
) -> tuple[RunFolder, bool]:
    """The folder for these settings, and whether a run goes on in it. Writes nothing.

    Raises UserError for a folder in use without ``resume=true``, and for a resume whose settings
    differ from the folder's in anything but ``MAY_CHANGE_ON_RESUME``.
    """
    given = settings["run_dir"]
    path = Path(given) if given else Path("runs") / experiment / run_name(settings, overrides)
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir must be a folder, got the file {path}")
    in_use = path.exists() and any(path.iterdir())
    if in_use and not settings["resume"]:
        raise UserError(f"run_dir must be empty or missing (resume=true goes on in it), got {path}")
    if not in_use:
        _check_can_be_made(path)
        return folder, False
    if not folder.config.exists():
        raise UserError(f"run_dir must be a run folder to resume (no config.yaml), got {path}")
    _check_settings_agree(_read_config(folder.config), settings)
    return folder, folder.last.exists()


def _check_can_be_made(path: Path) -> None:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"run_dir must lie in a folder that can be written, got {path}")


def _read_config(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"run_dir must hold a readable config.yaml, got {path}") from error
    if not isinstance(settings, dict):
        raise UserError(f"run_dir must hold a readable config.yaml, got {path}")
    return settings


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _check_settings_agree(old: dict, new: dict) -> None:
    kept_old, kept_new = (
        {
            name: value
            for name, value in _flat(settings).items()
            if name.split(".")[0] not in NOT_THE_EXPERIMENT and name not in MAY_CHANGE_ON_RESUME
        }
        for settings in (old, new)
    )
    for name in sorted(kept_old.keys() | kept_new.keys()):
        before, now = kept_old.get(name), kept_new.get(name)
        if before != now:
            raise UserError(f"{name} must stay {before!r} when a run is resumed, got {now!r}")


def drop_after(folder: RunFolder, step: int) -> None:
    """Delete what a run recorded after ``step`` (-1: everything): going on records it again.

    The rows of metrics.csv are its logger's matter (``MetricsCSV.keep_until``).
    """
    for part in folder.sinks.glob("part-*.parquet"):
        if _step_of(part.stem, "part-") > step:
            part.unlink()
    for kept in folder.last.parent.glob("step_*"):
        if _step_of(kept.name, "step_") > step:
            shutil.rmtree(kept)
    # What a kill left half-written.
    for half in folder.last.parent.glob(".step_*"):
        shutil.rmtree(half)
    folder.unfinished_last.unlink(missing_ok=True)


def _step_of(name: str, prefix: str) -> int:
    """The step in a name of ours; -1 for a name that isn't, which is left alone."""
    match = re.fullmatch(prefix + r"(\d{8})", name)
    return int(match[1]) if match else -1


def write_run_files(folder: RunFolder, settings: dict, provenance: dict) -> str:
    """Write config.yaml and provenance.json; a resume adds to the list of its starts.

    Returns the run's id, which is drawn at its first start.
    """
    run_id, starts = secrets.token_hex(4), []
    if folder.provenance.exists():
        try:
            written = json.loads(folder.provenance.read_text())
            run_id, starts = written["run_id"], list(written["starts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"run_dir must hold a readable provenance.json, got {folder.provenance}"
            ) from error
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, yaml.safe_dump(settings, sort_keys=False).encode())
    starts.append(provenance)
    text = json.dumps({"run_id": run_id, "starts": starts}, indent=2) + "\n"
    write_atomically(folder.provenance, text.encode())
    return run_id


def provenance(settings: dict, device: str, data: dict) -> dict:
    """What is needed to know where a number came from: one start of a run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "train", *sys.argv[1:]],
        "hash": experiment_hash(settings),
        "git": _git_state(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "device": device,
        "kernel_tiles_sha256": hashlib.sha256(TABLE.read_bytes()).hexdigest(),
        "threads": torch.get_num_threads(),
        "seed": settings["seed"],
        "data_seed": settings["data_seed"],
        "data": data,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the code and whether it had uncommitted changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
