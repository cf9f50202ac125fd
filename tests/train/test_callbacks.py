"""Callbacks taken by themselves."""

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from train.callbacks import progress
from train.callbacks.checkpoints import RandomState
from train.config import Compile
from train.metrics import SinkSums, SinkTotals


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_the_generators_go_on_where_the_checkpoint_was(tmp_path):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    torch.save(RandomState().state_dict(), tmp_path / "state")
    expected = draws()
    restored = RandomState()
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    draws()
    restored.on_train_batch_start(None, None, None, 0)
    assert draws() == expected


def test_sums_refuse_half_precision():
    half = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        SinkTotals(1)._add_layers("first", [0], SinkSums(half, half, half, half[:, None]))


@pytest.mark.parametrize(
    ("seconds", "steps", "compiled"),
    [
        (1.0, list(range(10, 151, 10)), Compile.whole),
        (0.125, [20, 40, 60, 80, 100, 120, 140, 150], Compile.nothing),
    ],
    ids=["slow", "fast"],
)
def test_a_line_of_progress_comes_with_a_new_record(monkeypatch, seconds, steps, compiled):
    """Lines every 7 or 8 steps had the same loss twice, with records every 10."""
    told, clock = io.StringIO(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    rows = SimpleNamespace(latest={}, loss_step=-1)
    display = progress.ProgressDisplay(Console(file=told), rows, 150, began=-2 * seconds)
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    display.on_train_start(trainer, SimpleNamespace(compiled=compiled))
    for trainer.global_step in range(1, 151):
        clock.now += seconds
        if trainer.global_step % 10 == 0:
            rows.loss_step, rows.latest = trainer.global_step, {"train/loss": clock.now}
        display.after_step(trainer, None, None)
    expected = [f"step {n}/150  loss {n * seconds:.3f}  {n * seconds:.0f} s" for n in steps]
    if compiled is not Compile.nothing:
        expected.insert(0, f"compiled: first step after {3 * seconds:.0f} s")
    assert told.getvalue().splitlines() == expected
