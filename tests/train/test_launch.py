"""Ranks that are started here: how they end, what is told, and which GPUs runs side by side get."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
import torch
from hydra import initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from kernels.errors import UserError
from tests.train.ranked import train_on_ranks
from train import launch
from train.config import compose
from train.gpus import VISIBLE, claimed, jobs_at_once, visible_gpus
from train.launch import RankFailed, start
from train.stopping import Stopped, StopSignals

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="forks a process with a GPU")


def arguments(cache_dir, folder, *overrides: str) -> tuple:
    config, settings = compose(
        ["debug=cpu", f"cache_dir={cache_dir}", f"run_dir={folder}", *overrides]
    )
    return config, {"settings": settings, "experiment": "default", "overrides": list(overrides)}


@no_gpu
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("optimizer.lr=-1",), "optimizer.lr must be > 0"),
        (("trainer.devices=3",), "the ranks that were started, got 3 x 1"),
        (("packing.batch_tokens=1152",), "packing.batch_tokens must be a multiple of"),
    ],
    ids=["settings", "ranks", "data"],
)
def test_a_mistake_that_every_rank_makes_is_told_once(cache_dir, tmp_path, capfd, overrides, told):
    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}")
    assert train_on_ranks(2, "debug=cpu", *where, "trainer.devices=2", *overrides) == [2, 2]
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert told in line
    assert not (tmp_path / "run").exists()


@no_gpu
def test_a_mistake_of_one_rank_ends_all(cache_dir, tmp_path, capfd, monkeypatch):
    from data.module import TokenDataModule

    setup = TokenDataModule.setup

    def breaks(self, stage=None):
        if os.environ.get("RANK") == "1":
            raise UserError("no room here")
        setup(self, stage)

    monkeypatch.setattr(TokenDataModule, "setup", breaks)
    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}")
    assert train_on_ranks(2, "debug=cpu", *where, "trainer.devices=2") == [2, 2]
    assert capfd.readouterr().err.count("error: no room here") == 1
    assert not (tmp_path / "run").exists()


def test_several_machines_are_not_started_from_here(tmp_path):
    config, run = arguments(tmp_path, tmp_path / "run", "trainer.num_nodes=2")
    with pytest.raises(UserError, match="must be 1 unless torchrun or srun starts"):
        start(config, **run)


def test_a_job_and_its_ranks_speak_through_files(cache_dir, tmp_path, monkeypatch):
    """What a rank is told is what was asked for; its mistake comes back as one."""
    asked = []

    def rank_that_finds_a_mistake(folder, ranks, environment):
        asked.append(json.loads((folder / launch.JOB).read_text()))
        (folder / launch.MISTAKE.format(rank=1)).write_text("x must be y")
        code = "import sys; sys.exit(int(sys.argv[1]))"
        return [subprocess.Popen([sys.executable, "-c", code, str(rank * 2)]) for rank in (0, 1)]

    monkeypatch.setattr(launch, "_start_ranks", rank_that_finds_a_mistake)
    config, run = arguments(cache_dir, tmp_path / "run", "trainer.devices=2")
    with pytest.raises(UserError, match=r"^x must be y$"):
        start(config, **run)
    assert asked[0]["settings"] == run["settings"]
    assert asked[0]["argv"] == sys.argv


def test_ranks_that_wait_for_a_dead_one_are_ended(cache_dir, tmp_path, monkeypatch):
    """The same for a signal: it goes on to the ranks, and then does its work here."""
    code = "import time; time.sleep(100)"
    started = []

    def ranks_of_which_one_dies(folder, ranks, environment):
        dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        started[:] = [subprocess.Popen([sys.executable, "-c", c]) for c in (code, dies)]
        return started

    monkeypatch.setattr(launch, "GRACE", 0.1)
    monkeypatch.setattr(launch, "_start_ranks", ranks_of_which_one_dies)
    config, run = arguments(cache_dir, tmp_path / "run", "trainer.devices=2")
    begin = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2 ended with SIGKILL"):
        start(config, **run)
    assert time.monotonic() - begin < 50
    assert all(process.returncode is not None for process in started)

    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        monkeypatch.setattr(
            launch,
            "_start_ranks",
            lambda *_: [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)],
        )
        for handler, error in ((before, Stopped), (signal.getsignal(signal.SIGTERM), RankFailed)):
            signal.signal(signal.SIGTERM, handler)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            # A launcher's own handler may let what it stopped go on.
            with pytest.raises(error, match="SIGTERM"), StopSignals() as signals:
                start(config, **run, signals=signals)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_runs_side_by_side_take_the_gpus_that_the_fewest_have(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gpus = ["4", "5", "GPU-7/a"]
    with claimed(1, gpus) as first, claimed(2, gpus) as second:
        assert (first[VISIBLE], second[VISIBLE]) == ("4", "5,GPU-7/a")
        # All are taken once; as many as there are may be wanted at once.
        with claimed(1, gpus) as third, claimed(3, gpus) as fourth:
            assert third[VISIBLE] == "4"
            assert sorted(fourth[VISIBLE].split(",")) == gpus
    with claimed(9, gpus) as again:
        assert again[VISIBLE] == "4,5,GPU-7/a"


def test_a_machine_has_room_for_a_run_a_gpu_or_two_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv(VISIBLE, "1,2,3,6,-1")
    assert visible_gpus() == ["1", "2", "3", "6"]
    assert [jobs_at_once(devices) for devices in (1, 2, 3, 8, "auto")] == [4, 2, 1, 1, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [jobs_at_once(devices) for devices in (1, 2, "auto")] == [4, 2, 4]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_two_ranks_go_on(cache_dir, tmp_path, monkeypatch):
    """Through processes of their own, as from the command line."""
    start_ranks, started = launch._start_ranks, []

    def kept(*given):
        started[:] = start_ranks(*given)
        return started

    def kill_when_it_trains() -> None:
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.1)
        started[1].kill()

    monkeypatch.setattr(launch, "_start_ranks", kept)
    monkeypatch.setattr(launch, "GRACE", 2)
    settings = ("trainer.devices=2", "trainer.progress=false", "tracking.last_every=2")
    config, run = arguments(cache_dir, tmp_path / "run", *settings, "trainer.max_steps=2000")
    threading.Thread(target=kill_when_it_trains).start()
    with pytest.raises(RankFailed, match="rank"):
        start(config, **run)
    assert all(process.returncode is not None for process in started)
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    step = last["global_step"]
    settings = (*settings, f"trainer.max_steps={step + 1}", "resume=true")
    config, run = arguments(cache_dir, tmp_path / "run", *settings)
    start(config, **run)
    assert (tmp_path / f"run/checkpoints/step_{step + 1:08d}").is_dir()


SWEEP = ("-m", "debug=cpu", "trainer.max_steps=2", "trainer.progress=false", "seed=0,1,2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=machine", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    ],
    ids=["joblib", "submitit"],
)
def test_a_failed_run_of_a_sweep_stops_no_other(cache_dir, tmp_path, launcher):
    """And the same sweep again runs what is missing."""
    place = tmp_path / "1"
    place.write_text("in the way")
    root = str(Path(__file__).parents[2])
    where = (f"cache_dir={cache_dir}", f"run_dir={tmp_path}/${{seed}}")

    def sweep() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "train", *SWEEP, *where, *launcher],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=200,
        )

    def finished() -> list[str]:
        return sorted(path.parents[1].name for path in tmp_path.glob("*/checkpoints/step_00000002"))

    done = sweep()
    assert done.returncode == 2, done.stderr
    summary, failed = done.stdout.splitlines()[-2:]
    assert summary.startswith("sweep    2 of 3 runs are finished, 1 failed")
    assert failed.startswith("  run 1 (debug=cpu ")
    assert failed.endswith(f": run_dir must be a folder, got the file {place}")
    assert finished() == ["0", "2"]
    place.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[02]/metrics.csv")}
    done = sweep()
    assert done.returncode == 0, done.stderr
    assert finished() == ["0", "1", "2"]
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


def test_the_help_names_every_launcher(capsys):
    from train.__main__ import command

    assert command(["--help"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("hydra/launcher: ")]
    presets = sorted(path.stem for path in Path(__file__).parents[2].glob("conf/hydra/launcher/*"))
    assert line == f"hydra/launcher: {', '.join(presets)}"


@pytest.mark.parametrize("launcher", ["machine", "slurm"])
def test_presets_of_launchers_compose(launcher):
    # Tells OmegaConf and Hydra what the presets need.
    import train.__main__

    assert train.__main__.SIDE_BY_SIDE
    with initialize_config_module(config_module="conf", version_base="1.3"):
        settings = hydra.compose(
            "train",
            [f"hydra/launcher={launcher}", "trainer.devices=2"],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(settings)
    try:
        chosen = OmegaConf.to_container(HydraConfig.get().launcher, resolve=True)
    finally:
        HydraConfig.instance().cfg = None
    if launcher == "machine":
        assert chosen["n_jobs"] == jobs_at_once(2)
    else:
        assert (chosen["gpus_per_node"], chosen["nodes"], chosen["tasks_per_node"]) == (2, 1, 1)
