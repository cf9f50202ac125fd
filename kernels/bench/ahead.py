"""Compile before timing, in many processes at once: the timed process then finds it all cached.

Most of a run's time would else go into FlexAttention, compiled anew for every shape, one at a time.

    python -m kernels.bench.ahead INDEX [the bench's own options]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

from kernels.bench.cases import Case, make_problem
from kernels.bench.contender import Contender, bound
from kernels.bench.contenders import taking_part
from kernels.bench.measure import compile_as_timed
from kernels.bench.options import parse

COMPILERS = 15
"""Processes; each holds one shape's tensors on the device."""


def in_processes(module: str, arguments: Sequence[str]) -> None:
    """Run ``python -m module INDEX arguments`` for every index below ``COMPILERS``, and wait.

    What a process can't do is left to the timed one, which reports it.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(index), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(COMPILERS)
    ]
    for process in processes:
        process.wait()


def compile_share(index: int, cases: list[Case], names: list[str], device: torch.device) -> None:
    """Run every ``COMPILERS``-th pair of case and contender once, in each variant."""
    pairs: list[tuple[Case, Contender]] = [
        (case, contender)
        for case in cases
        for contender in taking_part(case, names)
        if contender.compiles
    ]
    for case, contender in pairs[index::COMPILERS]:
        compile_as_timed()
        problem = make_problem(case, device)
        for variant in contender.variants(case):
            with suppress(Exception):
                bound(contender.prepare(problem, variant), problem.inputs(0)).both()


def main() -> None:
    """The command."""
    index, *arguments = sys.argv[1:]
    options = parse(arguments)
    with torch.cuda.stream(torch.cuda.Stream()):
        compile_share(int(index), options.cases, options.names, torch.device("cuda"))


if __name__ == "__main__":
    main()
