"""The fault table: what is injected into a run of eight steps, and what must come of it.

Every row of ``STOPS`` is injected, then the same command with ``resume=true`` must end in the
tables and weights of the run that nothing happened to, bit by bit; so must it after every kill of
``KILLED``. A run of ``SURVIVED`` must end so by itself. last.ckpt is written at steps 3, 6 and 8.
"""

import random
import signal
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from tests.train.faults.injections import (
    Inject,
    bad_loss,
    full_at_sync,
    full_for_weights,
    full_while_writing,
    raising,
    signalled,
    signalled_at_save,
    wandb_breaks,
    wandb_hangs,
    wandb_service_killed,
    wandb_unreachable,
)

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1

SLOW = pytest.mark.slow


class Stop(NamedTuple):
    """A fault that ends a run: exit code, the step of last.ckpt (None: no file), part of the one
    line on stderr."""

    inject: Inject
    code: int
    left: int | None
    said: str
    slow: bool = True


CPU_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.")

STOPS = {
    # Micro-batches 2n - 1 and 2n are step n.
    "SIGTERM in step 4": Stop(signalled(8, TERM), 143, 4, "stopped by SIGTERM: step 4", False),
    "SIGTERM between micro-batches": Stop(signalled(9, TERM), 143, 5, "step 5 is saved in"),
    "SIGTERM thrice": Stop(signalled(7, TERM, TERM, TERM), 143, 4, "step 4 is saved in"),
    "SIGTERM in the first step": Stop(signalled(1, TERM), 143, 1, "step 1 is saved in"),
    "SIGTERM in the last step": Stop(signalled(16, TERM), 143, 8, "step 8 is saved in"),
    "SIGTERM while saving": Stop(signalled_at_save(TERM), 143, 4, "step 4 is saved in"),
    "SIGUSR1 of sbatch --signal": Stop(signalled(10, USR1), 138, 5, "stopped by SIGUSR1: step 5"),
    "Ctrl-C": Stop(signalled(10, INT), 130, 5, "stopped by SIGINT: step 5"),
    "Ctrl-C twice": Stop(signalled(10, INT, INT), 130, 3, "resume=true goes on from the last"),
    "Ctrl-C twice before a state": Stop(
        signalled(4, INT, INT),
        *(130, None, "interrupted: there is no last.ckpt to go on from yet: resume=true begins"),
        False,
    ),
    "NaN loss": Stop(bad_loss(float("nan")), 2, 6, "NaN or infinity in the loss"),
    "infinite loss": Stop(bad_loss(float("inf")), 2, 6, "of step 7, rows 24 to 27"),
    "GPU memory": Stop(
        raising(8, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        *(2, 3, "out of memory: lower packing.micro_batch_rows (now 2;"),
    ),
    "CPU memory": Stop(raising(3, CPU_MEMORY), 2, None, "packing.context (now 128)", False),
    "full disk at the first state": Stop(
        full_while_writing("last.tmp", 1, 2000),
        *(2, None, "resume=true begins again, init_from={run}@2 with a new run_dir starts from"),
    ),
    "full disk at the second state": Stop(
        full_while_writing("last.tmp", 2, 2000),
        *(2, 3, "resume=true goes on from the last checkpoint, {run}/checkpoints/last.ckpt", False),
    ),
    "full disk at the third fsync": Stop(full_at_sync(3), 2, None, "no room on the disk at {run}"),
    "full disk at a later fsync": Stop(full_at_sync(18), 2, 3, "no room on the disk at {run}"),
    "full disk at kept weights": Stop(
        full_for_weights(4), 2, 3, "/model.safetensors (No space left on device)"
    ),
    "full disk at a row": Stop(full_while_writing("metrics.csv", 6, 9), 2, 3, "{run}/metrics.csv"),
    "full disk at the sinks": Stop(
        full_while_writing("part-00000006", 1, 9), 2, 3, "{run}/sinks/part-00000006.parquet"
    ),
}


class Survivor(NamedTuple):
    """A fault that a run survives: part of the one warning on stderr."""

    inject: Inject
    said: str
    slow: bool = True


SURVIVED = {
    "W&B not reached": Survivor(
        wandb_unreachable("online"), "could not be started online (CommError: network is down); it"
    ),
    "W&B not started": Survivor(wandb_unreachable("offline"), "W&B could not be started offline"),
    "W&B fails to log": Survivor(wandb_breaks("log", 3), "W&B is gone (ConnectionRes", False),
    "W&B fails at once": Survivor(wandb_breaks("define_metric", 1), "W&B is gone (Connection"),
    "W&B fails to finish": Survivor(wandb_breaks("finish", 1), "W&B is gone (ConnectionReset"),
    "W&B never finishes": Survivor(wandb_hangs, "W&B is gone (TimeoutError"),
    "W&B's process dies": Survivor(wandb_service_killed, "W&B is gone (ConnectionResetError"),
}

COUNTS = {
    "micro-batch": 16,
    "fsync": 18,
    "rename": 18,
    "state half written": 3,
    "weights half written": 5,
    "row half written": 9,
}
"""Calls of ``injections.KILLS`` in a run, the least of them."""


NAMED_KILLS = {"micro-batch": 9, "state half written": 2}
"""Places that are always among ``KILLED``."""


def random_kills(rounds: int) -> list[tuple[str, int]]:
    """Places of kills, drawn from those that aren't named: of each kind one in every part of the
    calls, of ``rounds`` equal ones, so that no place comes twice."""
    draw = random.Random(7)
    kills = []
    for where, count in COUNTS.items():
        rest = [number for number in range(1, count + 1) if number != NAMED_KILLS.get(where)]
        ends = [part * len(rest) // rounds for part in range(rounds + 1)]
        parts = [rest[begin:end] for begin, end in pairwise(ends) if begin < end]
        kills += [(where, draw.choice(part)) for part in parts]
    return kills


KILLED = [
    ("micro-batch", NAMED_KILLS["micro-batch"], True),
    ("state half written", NAMED_KILLS["state half written"], False),
    *((where, number, True) for where, number in random_kills(4)),
]
"""SIGKILL while training and checkpointing: where, at which call, slow."""

KILLED_PREPARING = [
    ("fsync", 3, False),
    *(("fsync", number, True) for number in (1, 2, 5, 6)),
    ("rename", 1, True),
]
"""SIGKILL while tokenizer and store are made."""
