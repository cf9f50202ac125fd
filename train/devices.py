"""Where a run trains, in what precision, whether it is compiled, and how fast the card could be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from kernels.errors import UserError
from train.config import Accelerator, Compile, Precision, StrategyName, TrainerConfig


class Peak(NamedTuple):
    """Dense products of a card, FLOP a second: of bf16, of TF32, of fp32 without TF32."""

    bf16: float
    tf32: float
    fp32: float


PEAKS = {
    "GH200": Peak(989.4e12, 494.7e12, 66.9e12),
    "H200 NVL": Peak(835.5e12, 417.7e12, 60e12),
    "H200": Peak(989.4e12, 494.7e12, 66.9e12),
    "H100 NVL": Peak(835.5e12, 417.7e12, 60e12),
    "L40S": Peak(362e12, 183e12, 91.6e12),
    "L40": Peak(181e12, 90.5e12, 90.5e12),
}
"""By the first of these that is in the device's name, from the maker's data sheets. For these cards
Lightning 2.6 has figures of sparse matrices or of another card, or doesn't know the name."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What MFU is a share of: FLOP a second of dense products of ``dtype`` (bfloat16 or float32);
    None if it isn't known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for chip, peak in PEAKS.items() if chip in name), None)
    if peak is not None:
        if dtype is torch.bfloat16:
            return peak.bf16
        return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32
    with warnings.catch_warnings():
        # Of a card that it doesn't know; perf/mfu is left out then.
        warnings.simplefilter("ignore")
        return get_available_flops(device, dtype)


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
