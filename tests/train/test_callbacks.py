"""Callbacks taken by themselves."""

import random

import numpy as np
import pytest
import torch

from train.callbacks.checkpoints import RandomState
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
