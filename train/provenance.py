"""Where a run's numbers come from: code, versions, machine, command, data."""

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.attention.fused.tiles import TABLE
from kernels.bench.environment import package_version
from train.privacy import private
from train.run_folder import PARENT, arm_hash, experiment_hash

PACKAGES = ("torch", "triton", "lightning", "hydra-core", "datasets", "tokenizers", "wandb")


def provenance(settings: dict, experiment: str, device: str, data: dict) -> dict:
    """What is needed to know where a number came from: one start of a run.

    ``parent``: of ``train.branching.find_parent``; None for a run that started from its seed.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "train", *private(sys.argv[1:])],
        "experiment": experiment,
        "hash": experiment_hash(settings),
        "arm": arm_hash(settings),
        "git": _git_state(),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in PACKAGES},
        "device": device,
        "kernel_tiles_sha256": hashlib.sha256(TABLE.read_bytes()).hexdigest(),
        "threads": torch.get_num_threads(),
        "seed": settings["seed"],
        "data_seed": settings["data_seed"],
        "parent": settings.get(PARENT),
        "data": data,
    }


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
