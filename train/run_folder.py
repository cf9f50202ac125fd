"""The folder a run leaves: its name, its hashes, and the rules for going on in it.

    runs/<experiment>/<name>/
        config.yaml         every setting, resolved
        provenance.json     commit, versions, device, seeds, command, data
        tokenizer.json      the tokenizer
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
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.files import PARTIAL, write_atomically
from kernels.errors import UserError
from train.kinds import without_told_kinds
from train.privacy import private

NOT_THE_EXPERIMENT = ("run_dir", "cache_dir", "resume", "logger")
"""Settings that don't change what is computed, so they are left out of the hash."""

SEEDS = ("seed", "data_seed")
"""Settings in which the runs of an arm differ."""

NOT_THE_ARM = (("trainer", "progress"), ("trainer", "num_workers"), ("tracking", "figures"))
"""Settings in which runs of an arm may differ too: nothing that is computed depends on them."""

RANKS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.compile")
"""Settings of who computes it, and how: what comes out is equal to rounding, so the hash knows
none."""

MAY_CHANGE_ON_RESUME = ("trainer.max_steps", "trainer.progress", "trainer.num_workers", *RANKS)
"""Settings of the experiment that a resumed run may nevertheless change."""

ADDED = {"attention.bias": 0.0}
"""Settings that kinds got after runs of them were stored, and what those runs have: such a value
counts as none, so that they keep their hashes and can be resumed."""

PARENT = "parent"
"""Key beside the settings of a stored run: whose weights it started from (``train.branching``)."""


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
    def probes(self) -> Path:
        return self.path / "probes"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

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
    """Eight hex digits of everything in ``settings`` that decides what is computed.

    Weights to start from count by their digest, not by where they lie. A kind counts where the
    section's other settings don't tell it.
    """
    kept = _of_the_experiment(settings)
    if parent := kept.pop(PARENT, None):
        kept["init_from"] = parent["weights_sha256"]
    return _hash(kept)


def arm_hash(settings: dict) -> str:
    """The same of the settings without ``seed`` and ``data_seed``: equal for all runs of an arm.

    Of weights to start from, the parent's arm and the step count, so that branches of the seeds of
    one arm are one arm.
    """
    kept = _of_the_experiment(settings)
    kept = {name: value for name, value in kept.items() if name not in SEEDS}
    for section, name in NOT_THE_ARM:
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key != name}
    if parent := kept.pop(PARENT, None):
        kept["init_from"] = [parent["arm"], parent["step"]]
    return _hash(kept)


def _of_the_experiment(settings: dict) -> dict:
    kept = without_told_kinds(_as_before(settings))
    kept = {name: value for name, value in kept.items() if name not in NOT_THE_EXPERIMENT}
    if "trainer" in kept:
        trainer = kept["trainer"].items()
        kept["trainer"] = {key: value for key, value in trainer if f"trainer.{key}" not in RANKS}
    # As runs were hashed before they could start from others.
    if kept.get("init_from") is None:
        kept.pop("init_from", None)
    return kept


def _as_before(settings: dict) -> dict:
    """Settings without those of ``ADDED`` that have the value of runs from before."""
    sections = {
        section: {
            key: value
            for key, value in settings[section].items()
            if (name := f"{section}.{key}") not in ADDED or ADDED[name] != value
        }
        for section in {name.split(".")[0] for name in ADDED} & settings.keys()
    }
    return settings | sections


def _hash(kept: dict) -> str:
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
    for override in private(overrides):
        name, _, value = override.lstrip("+~").partition("=")
        skipped = (*NOT_THE_EXPERIMENT, "experiment", *left_out)
        if name.split(".")[0] not in skipped and name not in RANKS:
            if name == "init_from":
                # Of the parent's name its hash will do.
                value = value.rsplit("-", 1)[-1].replace("@", ".")
            told.append(re.sub(r"[^A-Za-z0-9_.=+-]", "", f"{name.rsplit('.', 1)[-1]}={value}"))
    return "_".join(told)[:100]


def run_path(settings: dict, experiment: str, overrides: list[str]) -> Path:
    """Where the run of these settings is."""
    default = Path("runs") / experiment / run_name(settings, overrides)
    return Path(settings["run_dir"] or default).expanduser()


def open_run_folder(
    settings: dict, experiment: str, overrides: list[str]
) -> tuple[RunFolder, bool]:
    """The folder for these settings, and whether a run goes on in it. Writes nothing.

    Raises UserError for a folder in use without ``resume=true``, and for a resume whose settings
    differ from the folder's in anything but ``MAY_CHANGE_ON_RESUME``.
    """
    path = run_path(settings, experiment, overrides)
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir must be a folder, got the file {path}")
    # A file that a kill left half-written is no content.
    in_use = path.exists() and any(PARTIAL not in file.name for file in path.iterdir())
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


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line, ``packing.context``."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _check_settings_agree(old: dict, new: dict) -> None:
    kept_old, kept_new = (
        {
            name: value
            for name, value in flat(private(settings)).items()
            if name.split(".")[0] not in NOT_THE_EXPERIMENT and name not in MAY_CHANGE_ON_RESUME
        }
        for settings in (old, new)
    )
    for name in sorted(kept_old.keys() | kept_new.keys()):
        before, now = kept_old.get(name, ADDED.get(name)), kept_new.get(name, ADDED.get(name))
        # Folders from before kinds were stored have none; their checkpoint must fit all the same.
        is_new = name.endswith(".kind") and name not in kept_old
        if before != now and not is_new:
            raise UserError(f"{name} must stay {before!r} when a run is resumed, got {now!r}")


def stored_run_id(folder: RunFolder) -> str | None:
    """The id of the run in a folder, None for a new one. Raises UserError for a damaged file."""
    written = _read_provenance(folder)
    return None if written is None else written[0]


def _read_provenance(folder: RunFolder) -> tuple[str, list[dict]] | None:
    if not folder.provenance.exists():
        return None
    try:
        written = json.loads(folder.provenance.read_text())
        return written["run_id"], list(written["starts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run_dir must hold a readable provenance.json, got {folder.provenance}"
        ) from error


def write_run_files(folder: RunFolder, settings: dict, provenance: dict) -> str:
    """Write config.yaml and provenance.json; a resume adds to the list of its starts.

    Returns the run's id, which is drawn at its first start.
    """
    run_id, starts = _read_provenance(folder) or (secrets.token_hex(4), [])
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, yaml.safe_dump(settings, sort_keys=False).encode())
    starts.append(provenance)
    text = json.dumps({"run_id": run_id, "starts": starts}, indent=2) + "\n"
    write_atomically(folder.provenance, text.encode())
    return run_id
