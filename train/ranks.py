"""The ranks of a run: which one this process is, what they agree on, sums over all of them.

A run's ranks are started by ``train.launch`` (one machine), by ``torchrun`` or by ``srun``; each is
told who it is by the environment variables of ``torchrun``. What sums, gathers or agrees here is a
collective: all ranks call it, in the same order. With one rank it changes nothing.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.errors import UserError
from train.mistakes import KnownToAll

if TYPE_CHECKING:
    # Settings need modules that need sums over ranks.
    from train.config import TrainerConfig

PATIENCE = timedelta(hours=2)
"""How long ranks wait for each other: one of them may be tokenising a corpus."""


def is_rank() -> bool:
    """Whether this process was started as one of many ranks."""
    return _world_size() > 1


def _world_size() -> int:
    # Set for the tasks of srun only, not for the script that sbatch runs.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return int(os.environ.get("WORLD_SIZE", tasks))


def devices_here(trainer: TrainerConfig, accelerator: str) -> int:
    """Ranks on this machine: ``trainer.devices``, or what ``auto`` means.

    As many as were started, or one a GPU; one on a CPU, whose cores one process uses.
    Raises ``UserError`` for more GPUs than there are.
    """
    there = torch.cuda.device_count() if accelerator == "gpu" else None
    if trainer.devices == "auto":
        if is_rank():
            return _world_size() // trainer.num_nodes
        return there or 1
    wanted = int(trainer.devices)
    if there is not None and wanted > there:
        raise UserError(f"trainer.devices must be <= {there}, the GPUs there are, got {wanted}")
    return wanted


def join(trainer: TrainerConfig, accelerator: str) -> int:
    """Meet the other ranks; returns how many there are. Stays joined until the process ends.

    accelerator: Lightning's name, ``cpu`` or ``gpu``. Raises ``UserError`` if not as many were
    started as the settings say.
    """
    started = _world_size()
    devices = devices_here(trainer, accelerator)
    if started != devices * trainer.num_nodes:
        raise UserError(
            f"trainer.devices x trainer.num_nodes must be {started}, the ranks that were started, "
            f"got {devices} x {trainer.num_nodes}"
        )
    if started == 1 or dist.is_initialized():
        return started
    if "RANK" not in os.environ:
        _take_names_from_slurm()
    device = None
    if accelerator == "gpu":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "gloo" if device is None else "nccl"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device)
    atexit.register(_leave)
    return started


def _take_names_from_slurm() -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    names = {
        "RANK": slurm.global_rank(),
        "LOCAL_RANK": slurm.local_rank(),
        "GROUP_RANK": slurm.node_rank(),
        "WORLD_SIZE": _world_size(),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": slurm.main_port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the rank that writes files and talks."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def one_mistake() -> Iterator[None]:
    """A ``UserError`` that any rank raises in the block is raised by all of them at its end.

    No rank leaves the block before all have come to its end. Nothing in it may wait for others.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        if not dist.is_initialized():
            raise
        mistake = str(error)
    if not dist.is_initialized():
        return
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake)
    found = [text for text in mistakes if text is not None]
    if found:
        raise KnownToAll(found[0])


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks; ``value`` stays as it is."""
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: Tensor) -> Tensor:
    """The elementwise maximum over all ranks; ``value`` stays as it is."""
    return _reduced(value, dist.ReduceOp.MAX)


def _reduced(value: Tensor, operation: dist.ReduceOp) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value


def gathered(value: Tensor) -> Tensor:
    """The ranks' tensors, equal in shape, one after the other along the first dimension."""
    if not dist.is_initialized():
        return value
    # Collectives know no truth values.
    sent = (value.to(torch.uint8) if value.dtype == torch.bool else value).contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(value.dtype)
