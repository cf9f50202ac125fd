"""Shared fixtures: one cache of tokenizers and stores for a session, runs in CPU seconds."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "disabled"
# Tiny tensors gain nothing from a second thread, and the tests run in two processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# After OMP_NUM_THREADS, which it reads.
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which importing PyTorch does not do.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Tokenizers and token stores, built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(cache_dir, tmp_path) -> Callable[..., int]:
    """``train("seed=1", ...)``: a run in CPU seconds in its own folder; returns the exit code."""
    from train.__main__ import command

    def run(*overrides: str, run_dir: Path | None = tmp_path / "run") -> int:
        where = [] if run_dir is None else [f"run_dir={run_dir}"]
        return command(["debug=cpu", f"cache_dir={cache_dir}", *where, *overrides])

    return run
