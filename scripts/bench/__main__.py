"""Whole training steps, statistics on and off, beside a plain PyTorch loop, in one process.

    python -m scripts.bench                             gu60m, barbero120m and 1b on a GPU, minutes;
                                                        cpu, a small model, without: a minute
    python -m scripts.bench --presets default           the default run; on a CPU, 5 minutes
    python -m scripts.bench --presets gu60m --json FILE tracking.statistics=full

sinklab+stats is ``python -m train`` itself, sinklab the same with tracking.statistics=off, plain a
compiled PyTorch loop with the faster of flash and cuDNN attention from the same weights on the same
batches, and materialised is sinklab with the statistics got from written-out attention matrices
every n steps. They take turns in bursts of whole log periods. docs/speed.md says how to read it.

Overrides are those of python -m train. If losses of step --agree are more than --tolerance apart,
the table is printed all the same, the preset isn't written to --json, and the exit code is 2.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from kernels.bench.environment import environment
from kernels.errors import UserError, require
from scripts.bench.measure import Options, measure
from scripts.bench.settings import PRESETS
from scripts.bench.table import merged, read_entries, shown, written
from train.launch import quiet
from train.mistakes import exit_code

ON_GPU, ON_CPU = ["gu60m", "barbero120m", "1b"], ["cpu"]
"""What is timed without --presets. The models of the GPU's are out of a CPU's reach."""


def parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Options, presets and overrides of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        usage="%(prog)s [options] [overrides]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(PRESETS)
    for_all = f"of {names}; by default {' '.join(ON_GPU)} on a GPU, {' '.join(ON_CPU)} without one"
    parser.add_argument("--presets", nargs="+", default=[], metavar="NAME", help=for_all)
    for name, told in (
        ("rounds", "bursts of each contender"),
        ("agree", "steps until losses are compared"),
        ("every", "steps a materialised pass"),
    ):
        default = getattr(Options, name)
        told = f"{told}; {default} by default"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=told)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=Options.tolerance,
        metavar="NATS",
        help=f"how far apart they may be; {Options.tolerance} by default",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="rows of a micro-batch; by default the preset's"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="of the models; by default the tokenizer's"
    )
    parser.add_argument(
        "--compile", action="store_true", help="the plain loop on a CPU too; by default it isn't"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the figures to this file, or into it; by default they are printed only",
    )
    options, rest = parser.parse_known_args(arguments)
    # Overrides may follow the presets, which take all words up to the next option.
    words = [*options.presets, *rest]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    presets = [word for word in options.presets if "=" not in word]
    for word in rest:
        known = word in overrides
        require(known, "an argument", "must be an option or an override NAME=VALUE", word)
    if not presets:
        presets = ON_GPU if torch.cuda.is_available() else ON_CPU
    for preset in presets:
        require(preset in PRESETS, "--presets", f"must be among {names}", preset)
    return options, presets, overrides


def main(arguments: list[str]) -> None:
    """The command."""
    options, presets, overrides = parsed(arguments)
    quiet()
    settings = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    kept: list[dict[str, Any]] = [] if options.json is None else read_entries(options.json)
    about = environment("scripts.bench")
    all_apart = []
    for preset in presets:
        entries, apart = measure(preset, overrides, settings)
        print(shown(entries), flush=True)
        all_apart += apart
        if options.json is not None and not apart:
            kept = merged(kept, about, entries)
            options.json.write_text(written(kept))
    if all_apart:
        raise UserError(
            f"{'; '.join(all_apart)}: more than --tolerance {options.tolerance} nats apart after "
            f"--agree {options.agree} steps: the figures above are of runs that don't train alike"
            + ("" if options.json is None else f", and aren't written to {options.json}")
        )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
