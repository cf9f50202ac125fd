"""GPUs for runs that share a machine: each takes those that the fewest others have.

Who has which is in locks on files in the temporary folder, one a GPU and turn, that go with the
process that holds them. Runs of several sweeps see each other; other programs are not seen.
"""

import fcntl
import getpass
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def jobs_at_once(devices: int | str) -> int:
    """Runs of ``trainer.devices`` for which this machine has room: GPUs, or two cores a run."""
    gpus = len(visible_gpus())
    room = gpus or (os.cpu_count() or 1) // 2
    each = gpus if gpus and devices == "auto" else 1 if devices == "auto" else int(devices)
    return max(1, room // max(1, each))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return names[:count] or [str(index) for index in range(count)]


@contextmanager
def claimed(count: int, gpus: list[str]) -> Iterator[dict[str, str]]:
    """The variables of a process that is to use ``count`` of ``gpus``, held until the block ends.

    Free ones first; where all are taken, those that the fewest have.
    """
    with ExitStack() as held:
        names: list[str] = []
        for turn in itertools.count():
            for gpu in gpus:
                if len(names) < min(count, len(gpus)) and gpu not in names:
                    file = _lock(gpu, turn)
                    if file is not None:
                        held.enter_context(file)
                        names.append(gpu)
            if len(names) == min(count, len(gpus)):
                break
        yield {VISIBLE: ",".join(names)}


def _lock(gpu: str, turn: int) -> IO | None:
    folder = Path(tempfile.gettempdir()) / f"sinklab-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    file = (folder / f"{re.sub('[^A-Za-z0-9-]', '_', gpu)}.{turn}").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
