"""Where the time of a case goes: kernels by name, for ours with statistics and for cuDNN."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from kernels.bench.cases import Case, make_problem
from kernels.bench.check import truth_of
from kernels.bench.contender import Contender, bound
from kernels.bench.measure import checked

PASSES = 5
"""Forward and backward passes that a table averages over."""

NAME_WIDTH = 84


def kernel_table(case: Case, contender: Contender, device: torch.device) -> str:
    """Microseconds and launches of each kernel in one forward and backward pass.

    The contender runs in its first variant. Raises ``Skipped`` if it gives what it shouldn't.
    """
    problem = make_problem(case, device)
    variant = contender.variants(case)[0]
    bind, inputs = contender.prepare(problem, variant), problem.inputs(0)
    checked(contender, variant, bind, [inputs], truth_of(problem, inputs))
    call = bound(bind, inputs)
    for _ in range(3):
        call.both()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PASSES):
            call.both()
        torch.cuda.synchronize(device)
    # Calls of the CUDA runtime are listed too; they take no device time.
    rows = [
        (event.self_device_time_total / PASSES, event.count / PASSES, event.key)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    total = sum(microseconds for microseconds, _, _ in rows)
    lines = [f"{contender.name} ({variant}), {case.label}: {total:.1f} us a forward and backward"]
    for microseconds, count, name in sorted(rows, reverse=True):
        lines.append(f"{microseconds:10.1f} us {count:6.1f}x  {name[:NAME_WIDTH]}")
    return "\n".join(lines)
