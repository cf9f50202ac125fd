"""The rows of the fault table that end a run, or try to."""

import multiprocessing
import re
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.train.faults.injections import run_and_die, run_with_small_files, signalled
from tests.train.faults.table import KILLED, KILLED_PREPARING, SLOW, STOPS, SURVIVED
from tests.train.test_runs import assert_same_weights, metrics, sinks, weights

# The straight run and the server of processes are made once, by one worker.
pytestmark = pytest.mark.xdist_group("interruptions")

STEPS = 8

SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "tracking.validate_every=4",
    "tracking.last_every=3",
    "tracking.sinks_every=2",
    "tracking.log_every=1",
    "tracking.per_octave=1",
    "packing.batch_tokens=512",
    "packing.micro_batch_rows=2",
    "tracking.canonical_rows=2",
    "tracking.probe_rows=2",
    "model.d_model=64",
    "model.num_heads=1",
)


@pytest.fixture(scope="module")
def straight(cache_dir, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    from train.__main__ import command

    folder = tmp_path_factory.mktemp("straight") / "run"
    arguments = ["debug=cpu", f"cache_dir={cache_dir}", f"run_dir={folder}", *SETTINGS]
    assert command(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported what a run needs, and computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run", "tests.train.faults.injections"])
    return context


def assert_the_same_run(run: Path, straight: Path) -> None:
    """Tables and kept weights are those of the straight run, and nothing half-written is left."""
    pd.testing.assert_frame_equal(metrics(run), metrics(straight), check_exact=True)
    pd.testing.assert_frame_equal(sinks(run), sinks(straight), check_exact=True)
    for step in (0, 1, 2, 4, STEPS):
        assert_same_weights(weights(run, step), weights(straight, step))
    names = [path.relative_to(run).as_posix() for path in run.rglob("*")]
    assert not [name for name in names if re.search(r"partial|\.tmp|/\.step", name)], names


def saved_step(run: Path) -> int | None:
    last = run / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.exists() else None


def lines(text: str) -> list[str]:
    """What stderr says, without what is said while a step ends."""
    told = [line for line in text.splitlines() if line.strip()]
    return [line for line in told if not line.startswith("stopping at the end of this step")]


def go_on(train, run: Path) -> int:
    """The same command with resume=true; 0 too if the run was complete already."""
    complete = saved_step(run) == STEPS
    code = train(*SETTINGS, "resume=true", run_dir=run)
    return 0 if complete and code == 2 else code


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=[SLOW] * x.slow, id=name) for name, x in STOPS.items()]
)
def test_a_stopped_run_goes_on(train, straight, tmp_path, capfd, fault):
    run = tmp_path / "run"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.MonkeyPatch.context() as patch:
        fault.inject(patch)
        assert train(*SETTINGS, run_dir=run) == fault.code
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ]
    told = lines(capfd.readouterr().err)
    assert fault.said.format(run=run) in told[-1], told
    assert len(told) == 1 or fault.code == 130, told
    assert saved_step(run) == fault.left
    assert not list(run.glob("checkpoints/*.tmp"))
    assert go_on(train, run) == 0
    assert_the_same_run(run, straight)


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=[SLOW] * x.slow, id=name) for name, x in SURVIVED.items()]
)
def test_a_run_outlives_wandb(train, straight, tmp_path, capfd, fault):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fault.inject(patch)
        assert train(*SETTINGS, run_dir=run) == 0
    (warning,) = lines(capfd.readouterr().err)
    assert warning.startswith("warning: ") and fault.said in warning
    assert_the_same_run(run, straight)


@pytest.mark.parametrize(
    ("where", "number"),
    [pytest.param(where, n, marks=[SLOW] * slow) for where, n, slow in KILLED],
)
def test_a_killed_run_goes_on(train, straight, cache_dir, processes, tmp_path, where, number):
    run = tmp_path / "run"
    arguments = ["debug=cpu", f"cache_dir={cache_dir}", f"run_dir={run}", *SETTINGS]
    process = processes.Process(target=run_and_die, args=(arguments, where, number))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert go_on(train, run) == 0
    assert_the_same_run(run, straight)


@pytest.mark.parametrize(
    ("where", "number"),
    [pytest.param(where, n, marks=[SLOW] * slow) for where, n, slow in KILLED_PREPARING],
)
def test_a_cache_is_made_anew(train, straight, processes, tmp_path, where, number):
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = ["debug=cpu", f"cache_dir={cache}", f"run_dir={run}", *SETTINGS]
    process = processes.Process(target=run_and_die, args=(arguments, where, number))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not run.exists()
    assert train(*SETTINGS, f"cache_dir={cache}", run_dir=run) == 0
    assert_the_same_run(run, straight)


@pytest.mark.slow
def test_the_system_itself_refuses_a_file(train, straight, cache_dir, processes, tmp_path):
    run = tmp_path / "run"
    arguments = ["debug=cpu", f"cache_dir={cache_dir}", f"run_dir={run}", *SETTINGS]
    # Room for kept weights, none for a state.
    said = tmp_path / "said"
    process = processes.Process(target=run_with_small_files, args=(arguments, 10**6, said))
    process.start()
    process.join(60)
    assert process.exitcode == 2 and saved_step(run) is None
    (line,) = lines(said.read_text())
    assert "no room on the disk" in line and "last.tmp (File too large)" in line
    assert go_on(train, run) == 0
    assert_the_same_run(run, straight)


def test_a_signal_ends_a_sweep(train, cache_dir, tmp_path, monkeypatch, capfd):
    from train.__main__ import command

    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "seed=0,1", "debug=cpu", f"cache_dir={cache_dir}", *SETTINGS]
    with monkeypatch.context() as patch:
        signalled(2, signal.SIGTERM)(patch)
        assert command(sweep) == 143
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert folder.name.startswith("seed=0_") and saved_step(folder) == 1
    assert "stopped by SIGTERM: step 1 is saved in" in capfd.readouterr().err
