"""Ending a run from outside: Ctrl-C, SIGTERM (pre-emption, scancel), SIGUSR1 (sbatch --signal).

While it trains, a run finishes its step, saves its state and exits with 128 + the signal's number;
a second Ctrl-C stops at once. Before and after training there is nothing to save, so it stops there
and then. A launcher with a handler of its own for a signal (submitit's, which puts the job back in
the queue) gets its turn once the state is saved, and training goes on if it comes back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What stops a run; SIGUSR2 only where a launcher listens to it."""


class Stopped(BaseException):
    """A signal ended the run; the message says what is kept. No ``Exception``: a sweep ends too."""

    def __init__(self, number: int, message: str):
        # As it came, so that a launcher can hand it from process to process.
        super().__init__(number, message)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return self.args[1]


class StopSignals:
    """While entered, takes the signals of ``SIGNALS``; what was there before comes back at the end.

    received: the first signal's number, 0 for none. deferring: whether somebody will look at
    ``received`` at the end of the step; signals raise ``Stopped`` or KeyboardInterrupt if not.
    Outside the main thread, where Python takes no signals, this does nothing.

    requeues: whether SLURM may be asked to start the job again.
    """

    def __init__(self, *, requeues: bool = True) -> None:
        self.requeues = requeues
        self.received = 0
        self.deferring = False
        self._process = os.getpid()
        self._before: dict[int, Callable | int | None] = {}
        self._seen: set[int] = set()
        self._is_stopping = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGUSR2 or callable(signal.getsignal(number)):
                    self._before[number] = signal.getsignal(number)
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def install(self) -> None:
        """Take the signals, again where a library took them in between."""
        for number in self._before:
            signal.signal(number, self._handle)

    def let_go(self, number: int, saved: str) -> None:
        """Stop for a signal now that ``saved`` says where the state is, or return to go on.

        Raises ``Stopped`` unless the launcher's own handler deals with the signal.
        """
        self.received = 0
        self._seen.clear()
        handler = self._before.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(number, None)
            return
        self._is_stopping = True
        queued = requeue(number) if self.requeues and is_first_rank() else None
        told = f"stopped by {signal.Signals(number).name}: {saved}"
        raise Stopped(number, told if queued is None else f"{told}; {queued}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Helper processes are forked with this handler; their parent ends them.
        if os.getpid() != self._process or self._is_stopping:
            return
        is_second = number in self._seen
        self._seen.add(number)
        if number == signal.SIGINT and (is_second or not self.deferring):
            raise KeyboardInterrupt
        self.received = self.received or number
        if not self.deferring:
            self.let_go(number, "nothing was lost but what this start had not saved")
        elif not is_second and is_first_rank():
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            # Not print: it may be what was interrupted.
            os.write(2, f"\nstopping at the end of this step{again}\n".encode())


def is_first_rank() -> bool:
    """Whether this process speaks for the run."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) in (0, None)


def requeue(number: int) -> str | None:
    """Ask SLURM to start this job again; what came of it, None where that isn't called for.

    After SIGUSR1 (``sbatch --signal``) always. After SIGTERM only while SLURM calls the job
    running, as in the grace time of a pre-emption: otherwise it was cancelled, or SLURM has ended
    it, and somebody who cancels a job doesn't want it back.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number == signal.SIGINT:
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        # The bare number of a task may also be that of the whole array.
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        if number == signal.SIGTERM:
            state = _slurm("squeue", "--noheader", "--jobs", job, "--format", "%T").strip()
            if state != "RUNNING":
                return None
        _slurm("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        return f"SLURM job {job} could not be requeued: {' '.join(str(reason).split())}"
    return f"requeued SLURM job {job}"


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout
