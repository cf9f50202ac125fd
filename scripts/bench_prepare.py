"""How fast a corpus becomes a token store, beside the tokenizer library alone.

    python -m scripts.bench_prepare [--json FILE] [overrides]

Takes the settings of ``python -m train``. First the whole way, into a store of its own: reading the
source, splitting, tokenising in one process a core, leaving near-duplicates out, writing, checking.
Then the library: ``encode_batch`` over the same documents, in memory, a thousand at a time, one
thread a core. Both in megabytes of text a second; and the largest memory of a process of the first.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

from data.corpora import CORPORA
from data.shards import available_cores
from data.tokenizers import build_tokenizer
from kernels.errors import require
from train.config import compose
from train.mistakes import exit_code

BATCH = 1000
"""Documents given to the library at once."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options, overrides = parser.parse_known_args(arguments)
    config, _ = compose(overrides)
    kind = next(kind for kind in CORPORA.values() if kind.Config is type(config.corpus))
    require(hasattr(kind, "documents"), "corpus", "must be read, not generated", kind.__name__)
    corpus = kind(config.corpus, Path(config.cache_dir))
    tokenizer = build_tokenizer(config.tokenizer, corpus, corpus.cache_dir)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = corpus.tokenise(tokenizer, Path(folder))
        prepare_seconds = time.perf_counter() - start
    sizes = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]

    texts = [document.text for document in corpus.documents()]
    core = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        core.encode_batch(texts[first : first + BATCH], add_special_tokens=False)
    library_seconds = time.perf_counter() - start

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = sum(part["tokens"] for part in store.manifest["splits"].values())
    figures = {
        "megabytes": round(megabytes, 1),
        "tokens": tokens,
        "cores": available_cores(),
        "prepare_mb_per_s": round(megabytes / prepare_seconds, 3),
        "encode_batch_mb_per_s": round(megabytes / library_seconds, 3),
        "ratio": round(library_seconds / prepare_seconds, 3),
        "largest_process_mib": max(sizes) // 1024,
    }
    print(f"{megabytes:.1f} MB of text, {tokens:,} tokens, {available_cores()} cores")
    print(f"source to store   {figures['prepare_mb_per_s']:8.3f} MB/s")
    print(f"encode_batch      {figures['encode_batch_mb_per_s']:8.3f} MB/s")
    print(f"ratio             {figures['ratio']:8.3f}")
    print(f"largest process   {figures['largest_process_mib']:8,} MiB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
