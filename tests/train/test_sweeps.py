"""Sweeps whose runs are in one process, one after the other."""

from pathlib import Path

import pytest
import torch

from tests.train.test_runs import SMALL, metrics

PACKINGS = (
    "causal,causal_document_bos,causal_pinned_bos,"
    "document,document_document_bos,document_pinned_bos"
)


@pytest.mark.slow
def test_the_six_packings_run_as_a_sweep(cache_dir, tmp_path, monkeypatch):
    from train.__main__ import command

    monkeypatch.chdir(tmp_path)
    arguments = ["-m", f"packing={PACKINGS}", "debug=cpu", f"cache_dir={cache_dir}"]
    assert command([*arguments, "trainer.max_steps=2", "corpus.unit=paragraphs"]) == 0
    folders = {path.name: path for path in (tmp_path / "runs" / "default").iterdir()}
    names = sorted(name.rsplit("-", 1)[0] for name in folders)
    assert names == sorted(
        f"packing={p}_debug=cpu_max_steps=2_unit=paragraphs" for p in PACKINGS.split(",")
    )
    assert len({metrics(folder)["train/loss"].iloc[-1] for folder in folders.values()}) == 6


@pytest.mark.parametrize("runs", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_sweep_outlives_a_failed_run_and_runs_what_is_missing(
    cache_dir, tmp_path, monkeypatch, capsys, runs
):
    from train.__main__ import command
    from train.module import PretrainModule

    step = PretrainModule.training_step

    def fails(self, batch, batch_idx):
        if torch.initial_seed() == 1 and self.trainer.global_step == 2:
            raise RuntimeError("out of luck")
        return step(self, batch, batch_idx)

    monkeypatch.chdir(tmp_path)
    seeds = ",".join(map(str, range(runs)))
    same = ["debug=cpu", f"cache_dir={cache_dir}", "trainer.max_steps=3", *SMALL]
    sweep = ["-m", f"seed={seeds}", *same]
    with monkeypatch.context() as failing:
        failing.setattr(PretrainModule, "training_step", fails)
        assert command(sweep) == 1
    told = capsys.readouterr()
    assert "RuntimeError: out of luck" in told.err and "failed: run 1 (seed=1 " in told.err
    # Nobody asked to resume, and a sweep's runs have a line each where a run has a table.
    assert " to resume in " not in told.out and "unigram entropy" not in told.out
    assert told.out.count(": trained for") == runs - 1
    finished = f"sweep    {runs - 1} of {runs} runs are finished, 1 failed; the same command runs"
    summary, failed = told.out.splitlines()[-2:]
    assert summary.startswith(finished)
    (folder,) = Path("runs/default").glob("seed=1_*")
    # Of the last run it stands right above.
    why = "" if runs == 2 else ": RuntimeError: out of luck"
    assert failed.startswith("  run 1 (seed=1 ") and failed.endswith(f"), in {folder}{why}")
    folders = {path.name[:7]: path for path in (tmp_path / "runs" / "default").iterdir()}
    finished = {name for name, path in folders.items() if (path / "checkpoints/last.ckpt").exists()}
    assert len(finished) == runs - 1 and "seed=1_" not in finished
    before = {name: (folders[name] / "metrics.csv").stat() for name in finished}
    assert command(sweep) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before: ") == runs - 1 and shown.count("trained for") == 1
    assert shown.endswith(f"sweep    all {runs} runs are finished\n")
    folders = {path.name[:7]: path for path in (tmp_path / "runs" / "default").iterdir()}
    assert metrics(folders["seed=1_"])["step"].iloc[-1] == 3
    assert before == {name: (folders[name] / "metrics.csv").stat() for name in finished}


def test_mistakes_fail_their_runs_alone_and_are_told_once(cache_dir, tmp_path, monkeypatch, capsys):
    from train.__main__ import command

    monkeypatch.chdir(tmp_path)
    same = ["debug=cpu", f"cache_dir={cache_dir}", "trainer.max_steps=1", *SMALL]
    assert command(["-m", "model.num_heads=3,2,5", *same]) == 2
    told = capsys.readouterr()
    rule = "model.d_model must be a multiple of model.num_heads"
    errors = [line for line in told.err.splitlines() if rule in line]
    assert [line.startswith("error: run ") for line in errors] == [True] * 2
    summary, *failed = told.out.splitlines()[-3:]
    assert summary.startswith("sweep    1 of 3 runs are finished, 2 failed")
    # A run has ended well since the first of them.
    assert [line.split(" (")[0] for line in failed] == ["  run 0", "  run 2"]
    assert [rule in line for line in failed] == [True, False]
