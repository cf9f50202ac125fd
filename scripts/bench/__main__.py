"""Whole training steps, statistics on and off, beside a plain PyTorch loop, in one process.

    python -m scripts.bench [--presets gu60m barbero120m 1b] [--rounds N] [--rows R]
                            [--json FILE] [overrides]

sinklab+stats is ``python -m train`` itself, sinklab the same with tracking.statistics=off, plain a
compiled PyTorch loop with the faster of flash and cuDNN attention from the same weights on the same
batches, and materialised is sinklab with the statistics got from written-out attention matrices
every n steps. They take turns in bursts of whole log periods. docs/speed.md says how to read it.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from kernels.bench.environment import environment
from kernels.errors import require
from scripts.bench.measure import Options, measure
from scripts.bench.settings import PRESETS
from scripts.bench.table import merged, read_entries, shown, written
from train.launch import quiet
from train.mistakes import exit_code


def parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Options, presets and overrides of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(PRESETS)
    parser.add_argument("--presets", nargs="+", default=[], metavar="NAME", help=f"of {names}")
    parser.add_argument(
        "--rounds", type=int, default=Options.rounds, help="bursts of each contender"
    )
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; the preset's by default")
    parser.add_argument(
        "--agree", type=int, default=Options.agree, help="steps until losses are compared"
    )
    parser.add_argument(
        "--tolerance", type=float, default=Options.tolerance, help="nats they may differ by"
    )
    parser.add_argument(
        "--every", type=int, default=Options.every, help="steps a materialised pass"
    )
    parser.add_argument("--vocab-size", type=int, help="of the models; by default the tokenizer's")
    parser.add_argument("--compile", action="store_true", help="the plain loop on a CPU too")
    parser.add_argument("--json", type=Path, help="write the figures to this file, or into it")
    options, rest = parser.parse_known_args(arguments)
    # Overrides may follow the presets, which take all words up to the next option.
    words = [*options.presets, *rest]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    presets = [word for word in options.presets if "=" not in word]
    for word in rest:
        known = word in overrides
        require(known, "an argument", "must be an option or an override NAME=VALUE", word)
    if not presets:
        # A preset's model is out of a CPU's reach.
        has_gpu = torch.cuda.is_available()
        presets = ["gu60m", "barbero120m", "1b"] if has_gpu else ["default"]
    for preset in presets:
        require(preset in PRESETS, "--presets", f"must be among {names}", preset)
    return options, presets, overrides


def main(arguments: list[str]) -> None:
    """The command."""
    options, presets, overrides = parsed(arguments)
    if options.json is not None:
        folder = options.json.parent
        require(folder.is_dir(), "--json", "must be in a folder that exists", str(options.json))
    quiet()
    settings = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    kept: list[dict[str, Any]] = [] if options.json is None else read_entries(options.json)
    about = environment("scripts.bench")
    for preset in presets:
        entries = measure(preset, overrides, settings)
        print(shown(entries), flush=True)
        kept = merged(kept, about, entries)
        if options.json is not None:
            options.json.write_text(written(kept))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
