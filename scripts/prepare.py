"""Tokenise a corpus ahead of time: what training would do itself, before a GPU waits for it.

    python -m scripts.prepare [--processes N] [overrides]

Takes the settings of ``python -m train``; those of ``corpus`` and ``tokenizer`` and ``cache_dir``
matter. Interrupted, the same command goes on where it stopped: what is tokenised stays, though the
source is read from its beginning. A finished store is checked against its checksums. Then it tells
what each packer would do to the documents in rows of ``packing.context``.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from data.corpora import open_corpus
from data.packing import Packer, plan_epoch
from data.report import packing_report
from kernels.errors import require
from train.config import compose
from train.mistakes import exit_code


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--processes", type=int, help="that tokenise; default: one a core; 1: this one"
    )
    options, overrides = parser.parse_known_args(arguments)
    processes = options.processes
    require(processes is None or processes >= 1, "--processes", "must be >= 1", processes)
    config, _ = compose(overrides)
    start = time.monotonic()
    corpus = open_corpus(config.corpus, config.tokenizer, Path(config.cache_dir), processes)
    seconds = time.monotonic() - start
    print(
        f"tokenizer {corpus.tokenizer.vocab_size:,} tokens, sha256 {corpus.tokenizer.sha256[:12]}"
    )
    for line in corpus.describe():
        print(line)
    print(f"data sha256 {corpus.sha256}; ready and checked after {seconds:.1f} s")
    documents = corpus.train.epoch(0)
    print(f"in rows of {config.packing.context} tokens:")
    for packer in Packer:
        packing = replace(config.packing, packer=packer)
        plan = plan_epoch(documents.lengths_N, packing, config.data_seed, 0)
        report = packing_report(plan, documents.lengths_N, packing)
        print(f"  {packer:8} {report.shares}")


def command(arguments: list[str]) -> int:
    """Run it with these arguments; returns the exit code."""
    return exit_code(
        main, arguments, interrupted="interrupted: the same command goes on where it stopped"
    )


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
