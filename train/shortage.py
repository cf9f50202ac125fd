"""No room left, in memory or on a disk: what to do about it, in one line."""

from __future__ import annotations

import errno

import torch

from kernels.errors import UserError
from train.config import RunConfig
from train.going_on import way_on
from train.run_folder import RunFolder

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Full, over a quota, over the size that a file may have."""

NO_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What messages say that are no ``torch.OutOfMemoryError``: of the CPU, of other libraries."""


def shortage(
    error: BaseException, config: RunConfig | None = None, folder: RunFolder | None = None
) -> UserError | None:
    """What ran out, if ``error`` is about that, and what to do; None if it isn't.

    config, folder: of the run that it happened to, if it was one; what to do is about its settings
    and about what it has kept.
    """
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        where = f" at {error.filename}" if error.filename is not None else ""
        return UserError(
            f"no room on the disk{where} ({error.strerror}); what was kept before is whole. With "
            f"room again, {'run the same command' if config is None else way_on(folder)}"
        )
    told = str(error)
    is_memory = (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in told for words in NO_MEMORY))
    )
    return UserError(f"out of memory: {_what_to_lower(config)}") if is_memory else None


def _what_to_lower(config: RunConfig | None) -> str:
    if config is None:
        return "use less data at a time, or a machine with more"
    packing, model = config.packing, config.model
    rows = packing.micro_batch_rows
    lower = []
    if rows is None and packing.batch_rows > 1:
        lower.append(
            f"set packing.micro_batch_rows (now null, all {packing.batch_rows} rows at once; the "
            "gradients are the same for any)"
        )
    elif rows is not None and rows > 1:
        lower.append(f"lower packing.micro_batch_rows (now {rows}; the gradients stay the same)")
    lower += [
        f"lower packing.context (now {packing.context})",
        f"model.num_layers or model.d_model (now {model.num_layers}, {model.d_model})",
    ]
    return ", or ".join(lower)
