"""What a measured figure depends on beside the code."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(module: str) -> dict[str, Any]:
    """Card (or "cpu"), versions, and the command ``python -m module`` with the process's arguments.

    commit: HEAD, marked where the tree differs from it; None outside a checkout.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
    }


def package_version(package: str) -> str | None:
    """The installed version; None if it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).parent
    described = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        shown = subprocess.run(described, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()
