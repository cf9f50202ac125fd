"""Our attention at each level of statistics against PyTorch's backends, in one process.

    python -m kernels.bench [--json FILE]                         every shape of record
    python -m kernels.bench --preset quick                        three shapes
    python -m kernels.bench --shape 8,12,8192,64 --mask causal    one shape
    python -m kernels.bench --profile 8,12,8192,64                kernels by name
    python -m kernels.bench --tune                                renew this card's tile table

Before a shape is timed, what each of ours gives is checked against the reference in fp64 on the
same inputs; where that is red no number is printed and the exit code is 1. Contenders take turns,
and medians are shown; a claim's ratio is of forward and backward together.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from kernels.bench.ahead import in_processes
from kernels.bench.cases import DOCUMENT_MEDIAN, DOCUMENT_SIGMA, Case
from kernels.bench.contender import Skipped
from kernels.bench.contenders import taking_part
from kernels.bench.environment import environment
from kernels.bench.measure import measure_case
from kernels.bench.options import parse
from kernels.bench.profiling import kernel_table
from kernels.bench.table import case_block, summary, write_json
from kernels.bench.timing import Clock, CudaClock
from kernels.bench.tune import tune
from kernels.errors import UserError


def run(
    cases: list[Case],
    names: list[str],
    *,
    device: torch.device,
    clock: Clock,
    environment: dict[str, Any],
    rounds: int = 20,
    json_path: Path | None = None,
    budget: float | None = None,
) -> int:
    """Check and time the cases, print and write what comes out.

    names: contenders, all if empty. budget: seconds after which no case is started. Returns the
    exit code: 1 if a check was red.
    """
    start = time.monotonic()
    choices: dict[tuple[str, str, int], str] = {}
    records: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    reds: list[str] = []
    not_started: list[str] = []
    environment = environment | {"notes": notes, "red": reds, "not_started": not_started}
    for case in cases:
        if budget is not None and time.monotonic() - start > budget:
            not_started.append(case.label)
            continue
        result = measure_case(
            case,
            taking_part(case, names),
            device=device,
            clock=clock,
            choices=choices,
            rounds=rounds,
        )
        for contender, reason in result.notes:
            notes.append({"case": case.label, "implementation": contender, "note": reason})
            print(f"note: {case.label} {contender}: {reason}", flush=True)
        if result.red:
            reds.append(f"{case.label} {result.red}")
            print(f"RED {reds[-1]}", flush=True)
        else:
            records += result.records
            print(case_block(case.label, result.records), flush=True)
        if json_path:
            write_json(json_path, environment, records)
    if json_path:
        write_json(json_path, environment, records)
    print(f"\n{environment['device']}, {time.monotonic() - start:.0f} s\n\n{summary(records)}")
    for red in reds:
        print(f"RED {red}")
    if not_started:
        print(f"budget spent, not started: {len(not_started)} ({'; '.join(not_started)})")
    return 1 if reds else 0


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    options = parse(arguments, __doc__)
    if not torch.cuda.is_available():
        raise UserError(f"device must be a CUDA GPU, got none (torch {torch.__version__})")
    device = torch.device("cuda")
    # Graphs can't be captured on the default stream, nor what autograd began there.
    with torch.cuda.stream(torch.cuda.Stream()):
        if options.tune:
            tune(device, CudaClock(), options.rounds)
            return 0
        if options.profile:
            (case,) = options.cases
            rival = "cudnn" if case.mask == "causal" else "flex"
            for contender in taking_part(case, options.names or ["sinklab+stats", rival]):
                try:
                    print(kernel_table(case, contender, device))
                except Skipped as skipped:
                    raise UserError(f"{contender.name}: {skipped}") from skipped
            return 0
        if len(options.cases) > 1:
            in_processes("kernels.bench.ahead", arguments)
        return run(
            options.cases,
            options.names,
            device=device,
            clock=CudaClock(),
            environment={
                **environment("kernels.bench"),
                "rounds": options.rounds,
                "documents": f"log-normal, median {DOCUMENT_MEDIAN} tokens, sigma {DOCUMENT_SIGMA}",
            },
            rounds=options.rounds,
            json_path=options.json,
            budget=options.budget,
        )


def command() -> int:
    """``main`` on the command line's arguments, a user's mistake in one line."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(command())
