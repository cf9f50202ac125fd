"""Tokens a second that the training loader delivers, for each packer, with a worker and without.

    python -m scripts.bench_data [--seconds S] [--json FILE] [overrides]

Takes the settings of ``python -m train``; its own defaults are packing=document_pinned_bos, rows of
2048 tokens, 32 a batch, and both chunk and best_fit unless ``packing.packer`` is given. Batches are
taken as fast as they come, for S seconds in slices: the fastest slice counts, since other processes
only ever slow one down, and the median says how much they did.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data.packing import Packer
from models.batch import PackedBatch
from train.config import RunConfig, compose
from train.data import data_of
from train.mistakes import exit_code

DEFAULTS = ["packing=document_pinned_bos", "packing.context=2048", "packing.batch_tokens=65536"]
PACKERS = [Packer.chunk, Packer.best_fit]
WARM_UP = 5
"""Batches before the clock counts."""
SLICES = 5


def tokens_per_second(batches: Iterator[PackedBatch], seconds: float) -> list[float]:
    """The rate of each slice of the time; a slice has one batch at least."""
    for _ in range(WARM_UP):
        next(batches)
    rates = []
    for _ in range(SLICES):
        start = time.perf_counter()
        num_tokens, elapsed = 0, 0.0
        while not num_tokens or elapsed < seconds / SLICES:
            num_tokens += next(batches).tokens_BT.numel()
            elapsed = time.perf_counter() - start
        rates.append(num_tokens / elapsed)
    return rates


def measure(config: RunConfig, num_workers: int, seconds: float) -> dict:
    """One row of the figures."""
    data = data_of(config, num_workers=num_workers)
    rates = tokens_per_second(iter(data.train_dataloader()), seconds)
    return {
        "packer": config.packing.packer.value,
        "num_workers": num_workers,
        "context": config.packing.context,
        "batch_rows": config.packing.batch_rows,
        "tokens_per_second": round(max(rates)),
        "median_tokens_per_second": round(statistics.median(rates)),
    }


def described(row: dict) -> str:
    """``chunk, 1 worker: at best 6.1 M tokens/s (median 5.8)``."""
    best, median = row["tokens_per_second"] / 1e6, row["median_tokens_per_second"] / 1e6
    workers = f"{row['num_workers'] or 'no'} worker"
    return f"{row['packer']}, {workers}: at best {best:.1f} M tokens/s (median {median:.1f})"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_data", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="time for each figure")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options, overrides = parser.parse_known_args(arguments)
    chosen = any(override.startswith("packing.packer=") for override in overrides)
    packers = [[]] if chosen else [[f"packing.packer={packer.value}"] for packer in PACKERS]
    rows = []
    for packer in packers:
        # Of two values for one setting the later one counts.
        config, _ = compose([*DEFAULTS, *overrides, *packer])
        for num_workers in (1, 0):
            rows.append(measure(config, num_workers, options.seconds))
            print(described(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
