"""Two ranks that compile leave what one leaves, by DDP and by FSDP2: on GPUs, and on a CPU."""

import pytest
import torch

from tests.train.ranked import assert_same_runs, moved

pytestmark = pytest.mark.slow

TWO_GPUS = (
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
)

SETTINGS = (
    *("debug=cpu", "packing=causal_document_bos", "packing.micro_batch_rows=2"),
    *("tracking.statistics=full", "tracking.log_every=2", "tracking.sinks_every=2"),
    *("trainer.max_steps=6", "trainer.progress=false"),
)


@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [
        pytest.param("cpu", "fp32", 1e-4),
        pytest.param("gpu", "fp32", 1e-4, marks=TWO_GPUS),
        pytest.param("gpu", "bf16", 1e-2, marks=TWO_GPUS),
    ],
)
def test_two_ranks_leave_what_one_leaves(cache_dir, tmp_path, device, precision, tolerance):
    """And a run that two began with FSDP2 is ended by one."""
    from train.__main__ import command

    # On GPUs it is the default.
    compiled = ("trainer.compile=blocks",) if device == "cpu" else ()
    kind = (f"trainer.accelerator={device}", f"trainer.precision={precision}", *compiled)

    def train(name: str, *overrides: str) -> None:
        where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / name}")
        assert command([*SETTINGS, *kind, *where, *overrides]) == 0

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
