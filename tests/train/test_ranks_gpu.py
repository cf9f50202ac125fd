"""Two GPUs leave what one leaves, by DDP and by FSDP2."""

import pytest
import torch

from tests.train.ranked import assert_same_runs, moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SETTINGS = (
    *("debug=cpu", "trainer.accelerator=gpu", "packing=causal_document_bos"),
    *("packing.micro_batch_rows=2", "tracking.statistics=full", "tracking.log_every=2"),
    *("tracking.sinks_every=2", "trainer.max_steps=6", "trainer.progress=false"),
)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_two_gpus_leave_what_one_leaves(cache_dir, tmp_path, precision, tolerance):
    """And a run that two began with FSDP2 is ended by one."""
    from train.__main__ import command

    def train(name: str, *overrides: str) -> None:
        where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / name}")
        assert command([*SETTINGS, *where, f"trainer.precision={precision}", *overrides]) == 0

    train("one")
    two = "trainer.devices=2"
    train("ddp", two)
    assert_same_runs(tmp_path / "one", tmp_path / "ddp", tolerance)
    train("fsdp", two, "trainer.strategy=fsdp")
    assert_same_runs(tmp_path / "one", tmp_path / "fsdp", tolerance)
    train("both", two, "trainer.strategy=fsdp", "trainer.max_steps=3")
    train("both", "resume=true")
    assert_same_runs(tmp_path / "one", tmp_path / "both", tolerance, stopped_at=3)
    assert moved(tmp_path / "one") > 1e-3
