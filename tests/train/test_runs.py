"""Whole runs: what they leave, and that they go on exactly where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

SMALL = ("packing.batch_tokens=512", "tracking.canonical_rows=2", "tracking.probe_rows=2")

LONGER = (
    *SMALL,
    "tracking.validate_every=10",
    "tracking.log_every=2",
    "tracking.sinks_every=4",
    "tracking.last_every=10",
)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def metrics(run_dir: Path) -> pd.DataFrame:
    """metrics.csv without speeds, which are never the same twice."""
    table = pd.read_csv(run_dir / "metrics.csv")
    return table.drop(columns=[name for name in table if name.startswith("perf/")])


def sinks(run_dir: Path) -> pd.DataFrame:
    return pd.read_parquet(run_dir / "sinks").sort_values(
        ["step", "layer", "head", "key", "position"], ignore_index=True
    )


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_run_leaves_every_file_of_its_folder(train, tmp_path, capsys):
    assert train("tracking.figures=true") == 0
    run = tmp_path / "run"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    steps = (0, 1, 2, 3, 4)
    expected = {
        "config.yaml",
        "provenance.json",
        "tokenizer.json",
        "metrics.csv",
        "sinks/part-00000004.parquet",
        "checkpoints/last.ckpt",
        "figures/losses.png",
        "figures/norm_ratios.png",
        "figures/sinks_by_head.png",
        "figures/sinks_by_layer.png",
        *(f"checkpoints/step_{step:08d}/model.safetensors" for step in steps),
        *(f"checkpoints/step_{step:08d}/model.json" for step in steps),
    }
    assert files == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["num_layers"] == 2
    start = json.loads((run / "provenance.json").read_text())["starts"][0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["seed"] == 0 and start["data"]["store_sha256"]
    table = metrics(run)
    assert table["step"].tolist() == [0, 1, 2, 3, 4]
    assert table["val/canonical_loss"].notna().tolist() == [True, False, False, False, True]
    for name in ("train/loss", "sink/mass", "sink_row/mass", "norm_first/massive_ratio/layer_01"):
        assert table[name].notna().sum() >= 4, name
    table = sinks(run)
    assert set(table["key"]) >= {"first", "first_row", "position"}
    assert table["step"].unique().tolist() == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert "unigram entropy" in printed and "experiment=bigram_backcopy" in printed


def check_resumed(train, tmp_path: Path, half: int, same: tuple[str, ...]) -> Path:
    """``half`` steps and as many resumed leave what all of them at once do; returns the folder."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    steps = f"trainer.max_steps={2 * half}"
    assert train(*same, steps, run_dir=straight) == 0
    assert train(*same, f"trainer.max_steps={half}", run_dir=resumed) == 0
    assert train(*same, steps, "resume=true", run_dir=resumed) == 0
    assert_same_weights(weights(straight, 2 * half), weights(resumed, 2 * half))
    pd.testing.assert_frame_equal(metrics(straight), metrics(resumed), check_exact=True)
    pd.testing.assert_frame_equal(sinks(straight), sinks(resumed), check_exact=True)
    return resumed


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, tmp_path, workers):
    same = (*LONGER, "tracking.sinks_every=5", f"trainer.num_workers={workers}")
    resumed = check_resumed(train, tmp_path, 10, same)
    starts = json.loads((resumed / "provenance.json").read_text())["starts"]
    assert len(starts) == 2


class NoWaiting(L.Callback):
    """Makes PyTorch raise where a step that neither logs nor records waits for the GPU."""

    watched = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # Compilers may wait, and so may steps that log: every fifth.
        quiet = trainer.global_step >= 5 and (trainer.global_step + 1) % 5 != 0
        self.watched += quiet
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("packing", ["causal", "document_document_bos"])
def test_nothing_waits_for_the_gpu_between_log_steps(cache_dir, tmp_path, packing):
    from train.config import compose
    from train.launch import quiet
    from train.run import run

    quiet()
    far = ("tracking.validate_every=1000", "tracking.last_every=1000", "tracking.dense_until=0")
    rare = ("tracking.log_every=5", "tracking.sinks_every=5", "trainer.progress=false")
    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}", f"packing={packing}")
    gpu = ("debug=cpu", "trainer.accelerator=gpu", "trainer.max_steps=20")
    config, settings = compose([*gpu, *where, *far, *rare, "packing.micro_batch_rows=4"])
    watch = NoWaiting()
    try:
        run(config, settings=settings, experiment="default", overrides=[], callbacks=[watch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one_bit_for_bit(train, tmp_path):
    """In bf16, compiled, with the kernels of the card."""
    same = (*LONGER, "trainer.accelerator=gpu", "packing=document_pinned_bos")
    check_resumed(train, tmp_path, 20, same)


@pytest.mark.slow
def test_a_killed_run_goes_on_without_a_missing_or_doubled_row(train, cache_dir, tmp_path):
    same = (*LONGER, "trainer.max_steps=30")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(*same, run_dir=straight) == 0
    arguments = ["debug=cpu", f"cache_dir={cache_dir}", f"run_dir={killed}", *same]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "WANDB_MODE": "disabled"},
    )
    # Killed after a checkpoint (step 10) and before the next one (step 20), rows in between.
    deadline = time.monotonic() + 120
    seen = -1
    while seen < 14:
        assert time.monotonic() < deadline and process.poll() is None
        path = killed / "metrics.csv"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > 1 and lines[-1].split(",")[0].isdigit():
            seen = int(lines[-1].split(",")[0])
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "checkpoints" / "last.ckpt").exists()
    assert train(*same, "resume=true", run_dir=killed) == 0
    pd.testing.assert_frame_equal(metrics(straight), metrics(killed), check_exact=True)
    pd.testing.assert_frame_equal(sinks(straight), sinks(killed), check_exact=True)
    assert_same_weights(weights(straight, 30), weights(killed, 30))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(train, tmp_path, capsys):
    run = tmp_path / "run"
    begins = f"to resume in {run}: starting from the beginning"
    # As a script does that doesn't know whether it is the first to start the run.
    assert train("resume=true") == 0
    assert f"no run {begins}" in capsys.readouterr().out
    expected = metrics(run)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert train("resume=true") == 0
    assert f"no checkpoint {begins}" in capsys.readouterr().out
    pd.testing.assert_frame_equal(metrics(run), expected, check_exact=True)


def test_accumulation_changes_neither_gradient_nor_metrics(train, tmp_path):
    # Padding and document borders give the micro-batches unequal numbers of labels.
    same = ("packing=document_document_bos", "packing.packer=single", "corpus.unit=paragraphs")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*same, "packing.micro_batch_rows=null", run_dir=whole) == 0
    assert train(*same, "packing.micro_batch_rows=2", run_dir=parts) == 0
    one, other = metrics(whole), metrics(parts)
    assert one["norm/massive_ratio/layer_01"].notna().any()
    pd.testing.assert_frame_equal(one, other, rtol=2e-5, atol=2e-6)
    for name, tensor in weights(whole, 4).items():
        torch.testing.assert_close(tensor, weights(parts, 4)[name], rtol=1e-3, atol=2e-5)


def test_only_training_steps_are_compiled(train, tmp_path, monkeypatch):
    """Evaluations have many shapes, and each would be a variant of the compiled blocks."""
    compile_block, graphs = torch.nn.Module.compile, []

    def kept(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_block(self, backend=kept, **how)
    )
    torch.compiler.reset()
    assert train(*SMALL, "trainer.compile=blocks", run_dir=tmp_path / "run") == 0
    torch.compiler.reset()
    assert graphs == [True]


def test_statistics_off_trains_the_same_weights(train, tmp_path):
    on, off = tmp_path / "on", tmp_path / "off"
    assert train(*SMALL, run_dir=on) == 0
    assert train(*SMALL, "tracking.statistics=off", run_dir=off) == 0
    assert_same_weights(weights(on, 4), weights(off, 4))
    assert not (off / "sinks").exists()


def test_a_resume_keeps_to_its_schedule(train, tmp_path, capsys):
    same = (*SMALL, "schedule=cosine", "schedule.warmup_steps=1")
    assert train(*same) == 0
    capsys.readouterr()
    assert train(*same, "resume=true", "trainer.max_steps=8") == 2
    assert "schedule.total_steps must stay 4" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [["attention.window=32"], ["packing.context=32"]], ids=str)
def test_a_run_in_which_no_key_reaches_64_queries_has_losses_but_no_sinks(
    train, tmp_path, overrides
):
    assert train(*SMALL, *overrides, "trainer.max_steps=2") == 0
    table = metrics(tmp_path / "run")
    assert table["train/loss"].notna().sum() == 2
    assert not any(name.startswith("sink/") for name in table)


def test_an_odd_last_step_is_recorded_and_going_on_from_it_is_exact(train, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    same = (*LONGER, "tracking.sinks_every=4", "tracking.log_every=4")
    assert train(*same, "trainer.max_steps=8", run_dir=straight) == 0
    assert train(*same, "trainer.max_steps=6", run_dir=resumed) == 0
    assert metrics(resumed)["train/loss"].notna().iloc[-1]
    assert train(*same, "trainer.max_steps=8", "resume=true", run_dir=resumed) == 0
    last = [table.iloc[-1].drop(labels=[]) for table in (metrics(straight), metrics(resumed))]
    assert last[0]["step"] == 8
    pd.testing.assert_series_equal(*last, check_exact=True, check_names=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_trains_in_bf16(train, tmp_path):
    assert train("trainer.accelerator=gpu") == 0
    assert metrics(tmp_path / "run")["sink/mass"].notna().sum() == 4
