"""What the fault table injects: each is a function that breaks something while a run trains."""

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import wandb

from data import files
from models import checkpoints as weights
from train import loggers, wandb_service
from train.callbacks import checkpoints
from train.module import PretrainModule

Inject = Callable[[pytest.MonkeyPatch], None]


def every_call(patch: pytest.MonkeyPatch, owner: object, name: str, before: Callable) -> None:
    """Call ``before(number, *arguments)``, numbers from 1, ahead of each call of ``owner.name``."""
    original, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    def wrapped(*arguments, **options):
        before(next(calls), *arguments, *options.values())
        return original(*arguments, **options)

    patch.setattr(owner, name, wrapped)


def at_micro_batch(number: int, act: Callable[[], object]) -> Inject:
    """Do something in the forward pass of the n-th micro-batch; a step has two."""

    def inject(patch):
        def before(call, *_):
            if call == number:
                act()

        every_call(patch, PretrainModule, "training_step", before)

    return inject


def signalled(number: int, *numbers: int) -> Inject:
    """These signals, one after the other, in the n-th micro-batch."""
    return at_micro_batch(number, lambda: [os.kill(os.getpid(), which) for which in numbers])


def signalled_at_save(which: int) -> Inject:
    """A signal while last.ckpt is written for the first time, by schedule."""

    def before(call, *_):
        if call == 1:
            os.kill(os.getpid(), which)

    return lambda patch: every_call(patch, checkpoints.StateFileIO, "save_checkpoint", before)


def raising(number: int, error: Exception) -> Inject:
    """An error in the n-th micro-batch."""

    def act():
        raise error

    return at_micro_batch(number, act)


def bad_loss(value: float) -> Inject:
    """A loss that is no number from step 7 on."""

    def inject(patch):
        step = PretrainModule.training_step

        def breaks(self, batch, batch_idx):
            loss = step(self, batch, batch_idx)
            return loss * value if self.trainer.global_step >= 6 else loss

        patch.setattr(PretrainModule, "training_step", breaks)

    return inject


def full(path: Path | None = None) -> OSError:
    """What the system says when a disk is full; of a write, without a name."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if path is None else [str(path)]))


def full_at_sync(number: int) -> Inject:
    """A disk that is full at the n-th fsync."""

    def before(call, *_):
        if call >= number:
            raise full()

    return lambda patch: every_call(patch, files.os, "fsync", before)


class FullFile:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room: int):
        self._file, self._room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise full()
        return self._file.write(content)


def full_while_writing(name: str, number: int, room: int) -> Inject:
    """A disk without room for files of this name, from the n-th that is opened to be written."""

    def inject(patch):
        original, count = Path.open, iter(range(1, sys.maxsize))

        def opened(self, mode="r", *arguments, **options):
            file = original(self, mode, *arguments, **options)
            written = name in self.name and mode[0] in "wa"
            return FullFile(file, room) if written and next(count) >= number else file

        patch.setattr(Path, "open", opened)

    return inject


def full_for_weights(number: int) -> Inject:
    """What safetensors says of a full disk, at the n-th kept step."""

    def before(call, tensors, path):
        if call >= number:
            Path(path).write_bytes(b"the beginning")
            raise weights.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

    return lambda patch: every_call(patch, weights, "save_file", before)


def wandb_breaks(method: str, number: int) -> Inject:
    """A W&B run whose n-th call of a method fails, and all later ones."""

    def inject(patch):
        def before(call, *_):
            if call >= number:
                raise ConnectionResetError("Connection lost")

        patch.setenv("WANDB_MODE", "offline")
        every_call(patch, wandb.sdk.wandb_run.Run, method, before)

    return inject


def wandb_unreachable(*modes: str) -> Inject:
    """``wandb.init`` fails in these modes."""

    def inject(patch):
        init = wandb.init

        def fails(*arguments, mode, **options):
            if mode in modes:
                raise wandb.errors.CommError("network is down")
            return init(*arguments, mode=mode, **options)

        patch.setattr(wandb, "init", fails)
        patch.setattr(wandb, "login", lambda prompt: True)
        patch.setenv("WANDB_MODE", "online" if "online" in modes else "offline")

    return inject


def wandb_hangs(patch: pytest.MonkeyPatch) -> None:
    """``finish`` that never comes back."""
    finish = wandb.sdk.wandb_run.Run.finish

    def hangs(self, *arguments, **options):
        finish(self, *arguments, **options)
        time.sleep(3600)

    patch.setenv("WANDB_MODE", "offline")
    patch.setattr(wandb.sdk.wandb_run.Run, "finish", hangs)
    for module in (wandb_service, loggers):
        patch.setattr(module, "FINISH_SECONDS", 0.2)
        patch.setattr(module, "LEAVE_SECONDS", 0.3)


def wandb_service_killed(patch: pytest.MonkeyPatch) -> None:
    """W&B's own process killed in the middle."""

    def kill():
        tasks = Path("/proc/self/task").glob("*/children")
        children = [child for task in tasks for child in task.read_text().split()]
        programs = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
        (service,) = [child for child, program in programs.items() if "wandb-core" in program]
        os.kill(int(service), signal.SIGKILL)
        # W&B doesn't ask any more what became of it, and Python complains of that in a later test.
        started = [one for one in gc.get_objects() if type(one) is subprocess.Popen]
        (process,) = (one for one in started if one.pid == int(service))
        process.wait()

    patch.setenv("WANDB_MODE", "offline")
    at_micro_batch(7, kill)(patch)


def killed(where: str, number: int) -> Inject:
    """SIGKILL at the n-th call of one of ``KILLS``; for a process of its own."""

    def inject(patch):
        owner, name, half = KILLS[where]
        process = os.getpid()

        def before(call, *arguments):
            if call == number and os.getpid() == process:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

        every_call(patch, owner, name, before)

    return inject


def _nothing(*_: object) -> None:
    pass


def _half_state(io, state, path, *_: object) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(b"PK half a state")


def _half_weights(tensors, path) -> None:
    Path(path).write_bytes(b"half of the weights")


def _half_row(logger, metrics, step) -> None:
    if logger.path.exists():
        with logger.path.open("a") as file:
            file.write(f"{step},12")


KILLS: dict[str, tuple[object, str, Callable]] = {
    "micro-batch": (PretrainModule, "training_step", _nothing),
    "fsync": (os, "fsync", _nothing),
    "rename": (os, "replace", _nothing),
    "state half written": (checkpoints.StateFileIO, "save_checkpoint", _half_state),
    "weights half written": (weights, "save_file", _half_weights),
    "row half written": (loggers.MetricsCSV, "log_metrics", _half_row),
}
"""Where a kill lands: just before a call of owner.name, after what is half done by then."""


def run_and_die(arguments: list[str], where: str, number: int) -> None:
    """``python -m train`` in this process, killed there; exits with its code if it isn't."""
    from train.__main__ import command

    with pytest.MonkeyPatch.context() as patch:
        killed(where, number)(patch)
        code = command(arguments)
    os._exit(code)


def run_with_small_files(arguments: list[str], num_bytes: int, said: Path) -> None:
    """``python -m train`` in this process, where no file may be larger; exits with its code.

    said: where stderr goes.
    """
    from train.__main__ import command

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    with said.open("w") as file, redirect_stderr(file):
        code = command(arguments)
    os._exit(code)
