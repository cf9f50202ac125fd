"""Runs on several ranks of this machine, and two runs compared."""

import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from train.runs import load_run


def train_on_ranks(count: int, *overrides: str) -> list[int]:
    """The exit codes of ``python -m train`` on ranks that torchrun might have started.

    They are copies of this process, which has imported everything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(
            target=_rank, args=({**common, "RANK": rank, "LOCAL_RANK": rank}, list(overrides))
        )
        for rank in range(count)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads; none of ours is in the middle of anything.
        warnings.filterwarnings("ignore", "(?s).*use of fork", DeprecationWarning)
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join(100)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def _rank(environment: dict, arguments: list[str]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from train.__main__ import command

    warnings.simplefilter("default")
    os.environ.update({name: str(value) for name, value in environment.items()})
    # Read from the environment when Lightning is imported, which it has been.
    rank_zero_only.rank = environment["RANK"]
    code = command(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def assert_same_runs(
    one: Path, other: Path, tolerance: float, stopped_at: int | None = None
) -> None:
    """Equal but for rounding: all metrics but speed, all sinks, all kept weights.

    stopped_at: a step at which ``other`` ended at first, and measured because of that.
    """
    one_run, other_run = load_run(one), load_run(other)
    metrics, others = one_run.metrics(), other_run.metrics()
    others = others[others["step"] != stopped_at].reset_index(drop=True)
    assert set(metrics) == set(others)
    others = others[list(metrics)]
    timed = [name for name in metrics if name.startswith("perf/")]
    assert timed and len(metrics) > 1
    pd.testing.assert_frame_equal(
        metrics.drop(columns=timed), others.drop(columns=timed), rtol=tolerance, atol=tolerance
    )
    sinks = one_run.sinks()
    assert len(sinks)
    others = other_run.sinks()
    others = others[others["step"] != stopped_at].reset_index(drop=True)
    pd.testing.assert_frame_equal(sinks, others, rtol=tolerance, atol=tolerance)
    assert set(one_run.steps) == set(other_run.steps)
    for step in one_run.steps:
        weights, theirs = (
            load_file(run.folder.checkpoint(step) / "model.safetensors")
            for run in (one_run, other_run)
        )
        assert weights.keys() == theirs.keys()
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=tolerance, atol=tolerance)


def moved(path: Path) -> float:
    """How far the run's weights went, the largest change of a number."""
    run = load_run(path)
    first, last = (
        load_file(run.folder.checkpoint(step) / "model.safetensors")
        for step in (run.steps[0], run.steps[-1])
    )
    return max(float((last[name] - first[name]).abs().max()) for name in first)
