"""Where a run trains, in what precision, and whether it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels.errors import UserError
from train.config import Accelerator, Compile, Precision, StrategyName, TrainerConfig


def device_of(trainer: TrainerConfig) -> tuple[str, str]:
    """Lightning's names of accelerator and precision. Raises UserError for what isn't there."""
    accelerator = trainer.accelerator
    if accelerator is Accelerator.auto:
        accelerator = Accelerator.gpu if torch.cuda.is_available() else Accelerator.cpu
    if accelerator is Accelerator.gpu and not torch.cuda.is_available():
        raise UserError("trainer.accelerator must be cpu where there is no GPU, got gpu")
    precision = trainer.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if accelerator is Accelerator.gpu else Precision.fp32
    return accelerator.value, {Precision.bf16: "bf16-mixed", Precision.fp32: "32-true"}[precision]


def compiled_part(trainer: TrainerConfig, accelerator: str, world_size: int) -> Compile:
    """What ``trainer.compile`` means here, never auto; accelerator is Lightning's name."""
    part = trainer.compile
    if part is Compile.auto:
        part = Compile.blocks if accelerator == "gpu" else Compile.nothing
    # FSDP gathers a block's weights when it is called, which no graph of them all could do.
    is_sharded = world_size > 1 and trainer.strategy is StrategyName.fsdp
    return Compile.blocks if part is Compile.whole and is_sharded else part


@contextmanager
def new_memory_as_it_is() -> Iterator[None]:
    """In here deterministic algorithms don't fill every new tensor with NaN.

    That shows reads of what was never written, which is for tests, and takes a pass over memory.
    """
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
