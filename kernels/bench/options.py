"""The bench's command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from kernels.bench.cases import DTYPES, MASKS, PRESETS, select_cases
from kernels.bench.contenders import CONTENDERS, check_names
from kernels.errors import UserError, require


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str], description: str | None = None) -> argparse.Namespace:
    """Options of the command; ``UserError`` for wrong ones. description: for ``--help``."""
    parser = _Parser(
        prog="python -m kernels.bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    parser.add_argument(
        "--rounds", type=int, default=20, help="bursts of each contender a figure; default: 20"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every shape")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no shape after this time; compiling ahead is not counted",
    )
    parser.add_argument(
        "--profile", metavar="B,H,T,D", help="print the kernels of one shape and time nothing"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search tile shapes and write the table, nothing else"
    )
    options = parser.parse_args(arguments)
    require(options.rounds >= 2, "--rounds", "must be >= 2", options.rounds)
    budget = options.budget
    require(budget is None or budget > 0, "--budget", "must be > 0 seconds", budget)
    options.names = check_names([name for name in options.only.split(",") if name])
    ways = [name for name in ("preset", "shape", "profile", "tune") if getattr(options, name)]
    if len(ways) > 1:
        raise UserError(f"--{ways[1]} can't be combined with --{ways[0]}")
    unused = {
        "profile": ("json", "budget"),
        "tune": ("json", "budget", "only", "mask", "groups"),
    }
    for way in ways:
        for name in unused.get(way, ()):
            if getattr(options, name):
                raise UserError(f"--{name} has no use beside --{way}")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json must be a file in a folder that exists, got {options.json}")
    if options.profile:
        options.shape, options.mask = [options.profile], options.mask or "causal"
    options.cases = select_cases(
        options.preset or "record", options.shape, options.mask, options.groups, options.dtype
    )
    return options
