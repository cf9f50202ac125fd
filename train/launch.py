"""Starting a run: here, or in processes of its own, one for each of its ranks on this machine.

Ranks are plain processes, ``python -m train.rank``, with the environment variables that torchrun
would set. They end together: when one fails, the others get a moment, then they are killed. When
this process is killed, they notice (``train.rank``). Signals go on to them.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kernels.errors import UserError
from train.config import RunConfig
from train.devices import device_of
from train.gpus import claimed, visible_gpus
from train.ranks import devices_here, is_rank
from train.run import run
from train.stopping import StopSignals

GRACE = 10.0
"""Seconds that the other ranks have to end by themselves when one has failed."""

PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGTERM,
}
"""What the ranks get for a signal, all of whom save; Ctrl-C reaches them by itself. SIGUSR2 is
taken only where a launcher listens to it."""

JOB, MISTAKE = "job.json", "mistake-{rank}.txt"
"""Files between a run and its ranks: what to do, and the mistake that a rank found."""


class RankFailed(RuntimeError):
    """A rank that ended by something else than a user's mistake; it has said why."""


def quiet() -> None:
    """Silence what Lightning says about choices that are meant."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6's own use of a name that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    # Lightning counts cores; one process packs millions of tokens a second (scripts.bench_data).
    warnings.filterwarnings("ignore", ".*does not have many workers")
    # trainer.accelerator=cpu says so.
    warnings.filterwarnings("ignore", "GPU available but not used")
    # FSDP2 of torch 2.13: the logits leave out padded rows, and nothing is changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if is_rank():
        # All ranks open the corpus at once, and say that they wait for each other.
        logging.getLogger("data.files").setLevel(logging.ERROR)


def start(
    config: RunConfig,
    *,
    settings: dict,
    experiment: str,
    overrides: list[str],
    skip_finished: bool = False,
    brief: bool = False,
    apart: bool = False,
    signals: StopSignals | None = None,
) -> None:
    """``train.run.run``, on as many ranks as ``config.trainer`` says.

    apart: for runs side by side on this machine. Even one rank gets a process of its own, so that
    nothing that happens to it, not even a kill, happens to the others; and GPUs of its own.
    signals and the rest: as of ``run``.

    Raises ``UserError`` for a user's mistake, ``RankFailed`` if a rank ends otherwise.
    """
    quiet()
    arguments = {
        "settings": settings,
        "experiment": experiment,
        "overrides": overrides,
        "skip_finished": skip_finished,
        "brief": brief,
    }
    signals = signals or StopSignals()
    # What was compiled for a sweep's earlier runs counts towards a limit, after which nothing is.
    torch.compiler.reset()
    if is_rank():
        run(config, **arguments, signals=signals)
        return
    if config.trainer.num_nodes > 1:
        raise UserError(
            "trainer.num_nodes must be 1 unless torchrun or srun starts the ranks, "
            f"got {config.trainer.num_nodes}"
        )
    accelerator, _ = device_of(config.trainer)
    ranks = devices_here(config.trainer, accelerator)
    if ranks == 1 and not apart:
        run(config, **arguments, signals=signals)
    elif apart and accelerator == "gpu":
        with claimed(ranks, visible_gpus()) as environment:
            _run_apart(arguments, ranks, environment, signals)
    else:
        _run_apart(arguments, ranks, {}, signals)


def _run_apart(
    arguments: dict, ranks: int, environment: dict[str, str], signals: StopSignals
) -> None:
    with tempfile.TemporaryDirectory(prefix="sinklab-") as name:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps(arguments | {"argv": sys.argv}))
        processes = _start_ranks(folder, ranks, environment)
        with _passed_on(processes) as got_signal:
            try:
                failed = _wait(processes)
            except KeyboardInterrupt:
                # The ranks got it too, and save; a second one ends them at once.
                _wait(processes)
                raise
            finally:
                _end(processes)
        mistakes = [folder / MISTAKE.format(rank=rank) for rank in range(ranks)]
        for path in mistakes:
            if path.exists():
                raise UserError(path.read_text())
    codes = [process.returncode for process in processes]
    if any(code == 130 for code in codes):
        raise KeyboardInterrupt
    # Ranks that were sent a signal by somebody else have ended by it alike.
    ended_by = got_signal or [code - 128 for code in codes if code > 128]
    if ended_by:
        signals.let_go(ended_by[0], "the run's ranks have ended")
    if failed is not None:
        code = codes[failed]
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        raise RankFailed(f"rank {failed} of {ranks} ended with {how}")


def _start_ranks(folder: Path, ranks: int, environment: dict[str, str]) -> list[subprocess.Popen]:
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    common = {**os.environ, **environment, "PYTHONPATH": paths}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        # As many threads as cores in each rank would only get in each other's way.
        common.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks}
        command = [sys.executable, "-m", "train.rank", str(folder), str(rank)]
        variables = common | {name: str(value) for name, value in own.items()}
        processes.append(subprocess.Popen(command, env=variables))
    return processes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def _passed_on(processes: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Signals go to the ranks, which save and end; the list has what came."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return

    def pass_on(number: int, frame: object) -> None:
        got.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(PASSED_ON[number])

    taken = [n for n in PASSED_ON if n != signal.SIGUSR2 or callable(signal.getsignal(n))]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Until all have ended, or ``GRACE`` seconds after one failed; returns the first of these."""
    failed, deadline = None, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + GRACE
        if None not in codes or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen]) -> None:
    """End what is left of a run that has failed. Ranks that wait for a dead one hear nothing."""
    for process in processes:
        process.kill()
        process.wait()
