"""Signals outside training, beside a launcher, and under SLURM."""

import errno
import os
import pickle
import signal
from pathlib import Path

import pytest

from train.shortage import shortage
from train.stopping import Stopped, StopSignals, requeue


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A job, commands that write down how they are called, and the state that squeue tells."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "state").write_text("RUNNING\n")
    for name, does in (("scontrol", "test ! -e refuse"), ("squeue", "cat state")):
        script = f"#!/bin/sh\ncd {tmp_path}\necho {name} $@ >> calls\n{does}\n"
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def scontrol_calls(slurm: Path) -> list[str]:
    calls = slurm / "calls"
    told = calls.read_text().splitlines() if calls.exists() else []
    return [line for line in told if line.startswith("scontrol")]


def test_slurm_is_asked_to_start_the_job_again(slurm, monkeypatch):
    assert requeue(signal.SIGUSR1) == "requeued SLURM job 71"
    # As in the grace time of a pre-emption.
    assert requeue(signal.SIGTERM) == "requeued SLURM job 71"
    assert scontrol_calls(slurm) == ["scontrol requeue 71"] * 2
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue(signal.SIGUSR1) == "requeued SLURM job 70_3"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_a_cancelled_job_stays_cancelled(slurm, state):
    (slurm / "state").write_text(state + "\n")
    assert requeue(signal.SIGTERM) is None and scontrol_calls(slurm) == []


def test_nobody_is_asked_after_ctrl_c_or_without_slurm(slurm, monkeypatch):
    assert requeue(signal.SIGINT) is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue(signal.SIGUSR1) is None and scontrol_calls(slurm) == []


def test_a_refusal_is_told(slurm, monkeypatch):
    (slurm / "refuse").touch()
    assert requeue(signal.SIGUSR1).startswith("SLURM job 71 could not be requeued: ")
    monkeypatch.setenv("PATH", "")
    assert "No such file" in requeue(signal.SIGUSR1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_stops_there_and_then(number):
    with StopSignals(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_whatever_came_before_the_first():
    with StopSignals() as signals:
        signals.deferring = True
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_passes_handlers_and_processes():
    assert not issubclass(Stopped, Exception)
    stopped = pickle.loads(pickle.dumps(Stopped(15, "saved")))
    assert stopped.exit_code == 143 and str(stopped) == "saved"


@pytest.fixture
def launcher():
    """A launcher's handlers, as submitit sets them: calls by signal."""
    calls = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)}

    def preempted(number, frame):
        calls.append(number)
        raise SystemExit(-1)

    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    signal.signal(signal.SIGUSR2, preempted)
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_launcher_gets_its_signal_once_the_state_is_saved(launcher):
    with StopSignals() as signals:
        signals.deferring = True
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.received == signal.SIGUSR2 and launcher == []
        with pytest.raises(SystemExit):
            signals.let_go(signals.received, "saved")
    assert launcher == [signal.SIGUSR2]


def test_training_goes_on_if_the_launcher_passes_over_a_signal(launcher):
    with StopSignals() as signals:
        signals.deferring = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.let_go(signals.received, "saved")
            assert signals.received == 0
    assert launcher == [signal.SIGTERM] * 2


def test_without_a_launcher_sigusr2_is_nobodys_business():
    before = signal.getsignal(signal.SIGUSR2)
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR2) is before


def test_a_forked_helper_is_left_to_its_parent():
    with StopSignals() as signals:
        signals._process = -1
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["the system's", "Triton's"],
)
def test_too_little_memory_is_told_whoever_finds_it(error):
    assert str(shortage(error)).startswith("out of memory: ")
    assert shortage(OSError(errno.ENOENT, "No such file")) is None
    assert shortage(ValueError("out of memory")) is None
