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

import argparse
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from kernels.bench.cases import (
    DOCUMENT_MEDIAN,
    DOCUMENT_SIGMA,
    DTYPES,
    MASKS,
    PRESETS,
    Case,
    select_cases,
)
from kernels.bench.contenders import CONTENDERS, check_names, taking_part
from kernels.bench.measure import measure_case
from kernels.bench.profiling import kernel_table
from kernels.bench.table import case_block, summary, write_json
from kernels.bench.timing import Clock, CudaClock
from kernels.bench.tune import tune
from kernels.errors import UserError, require


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command; ``UserError`` for wrong ones."""
    parser = _Parser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: record")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="B,H,T,D",
        help="rows, heads, tokens a row, head dim; in place of a preset, may be repeated",
    )
    parser.add_argument("--mask", choices=MASKS, help="default: both, each shape")
    parser.add_argument("--groups", type=int, default=0, help="key/value heads; default: as heads")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"some of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=20, help="bursts of each contender a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every shape")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no shape after this time"
    )
    parser.add_argument(
        "--profile", metavar="B,H,T,D", help="print the kernels of one shape and time nothing"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search tile shapes and write the table, nothing else"
    )
    options = parser.parse_args(arguments)
    require(options.rounds >= 2, "--rounds", "must be >= 2", options.rounds)
    options.names = check_names([name for name in options.only.split(",") if name])
    ways = [name for name in ("preset", "shape", "profile", "tune") if getattr(options, name)]
    if len(ways) > 1:
        raise UserError(f"--{ways[1]} can't be combined with --{ways[0]}")
    if options.profile:
        options.shape, options.mask = [options.profile], options.mask or "causal"
    options.cases = select_cases(
        options.preset or "record", options.shape, options.mask, options.groups, options.dtype
    )
    return options


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


def environment_of(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on beside the code: card, versions, commit, command, documents."""
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "command": shlex.join(["python", "-m", "kernels.bench", *sys.argv[1:]]),
        "commit": _commit(),
        "rounds": options.rounds,
        "documents": f"log-normal, median {DOCUMENT_MEDIAN} tokens, sigma {DOCUMENT_SIGMA}",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """HEAD, marked where the tree differs from it; None outside a checkout."""
    folder = Path(__file__).parent
    described = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        shown = subprocess.run(described, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    options = parse(arguments)
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
                print(kernel_table(case, contender, device))
            return 0
        return run(
            options.cases,
            options.names,
            device=device,
            clock=CudaClock(),
            environment=environment_of(device, options),
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
