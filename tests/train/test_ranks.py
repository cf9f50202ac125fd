"""Two ranks on a CPU leave what one leaves: statistics, weights, and states that either resumes."""

from pathlib import Path

import pytest
import torch

from tests.train.ranked import assert_same_runs, moved, train_on_ranks

SETTINGS = (
    *("debug=cpu", "packing=document_document_bos", "packing.micro_batch_rows=2"),
    *("packing.packer=single", "corpus.unit=paragraphs"),
    *("tracking.statistics=full", "tracking.log_every=2", "tracking.sinks_every=2"),
    *("trainer.max_steps=5", "trainer.progress=false"),
)
"""Accumulation on one rank and on two, unequal numbers of labels, the entropy, and sums that go on
over the last record."""

ROUNDING = 1e-5

TWO = ("trainer.devices=2",)
FSDP = (*TWO, "trainer.strategy=fsdp")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a process that has used the GPU can't be forked"
)


@pytest.fixture(scope="module")
def one(cache_dir, tmp_path_factory) -> Path:
    """The run on one rank."""
    from train.__main__ import command

    folder = tmp_path_factory.mktemp("one") / "run"
    assert command([*SETTINGS, f"cache_dir={cache_dir}", f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(TWO, id="ddp"), pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow)],
)
def test_two_ranks_leave_what_one_leaves(one, cache_dir, tmp_path, ranks):
    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}")
    assert train_on_ranks(2, *SETTINGS, *where, *ranks) == [0, 0]
    assert_same_runs(one, tmp_path / "run", ROUNDING)
    assert moved(one) > 100 * ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [TWO, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("first", [1, 2])
def test_any_number_of_ranks_goes_on(one, cache_dir, tmp_path, ranks, first):
    """Three steps on one number of ranks, in the middle of sums and of what would be a step of the
    other, and the rest on the other."""
    from train.__main__ import command

    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}")
    parts = [("trainer.max_steps=3",), ("trainer.max_steps=5", "resume=true")]
    for count, part in zip((first, 3 - first), parts, strict=True):
        if count == 1:
            assert command([*SETTINGS, *where, *part]) == 0
        else:
            assert train_on_ranks(2, *SETTINGS, *where, *ranks, *part) == [0, 0]
    assert_same_runs(one, tmp_path / "run", ROUNDING, stopped_at=3)
