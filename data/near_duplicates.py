"""Held-out documents that repeat training text: those that share a run of n tokens with it.

Every run of n tokens has a 64-bit hash: sum_k r[t_k] b^k modulo 2**64, with a random number r for
each token and an odd b. From running sums, all runs of an array cost a few passes. Of h held-out
runs and t training runs about h t / 2**64 pairs of different ones are taken for the same: 0.003 for
5 million and 10**10.

Axes: N documents, L tokens of a block, W runs that begin in it, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.documents import Documents
from data.progress import Progress

BLOCK_TOKENS = 1 << 18
"""Tokens hashed at once."""

HELD_OUT_RUNS = 1 << 22
"""Held-out runs looked for in one pass over the training text: what bounds the memory."""

_FILTER_BITS = 26


class RunHashes:
    """Hashes of the runs of ``run_tokens`` tokens of any text over a vocabulary."""

    def __init__(self, vocab_size: int, run_tokens: int):
        self.run_tokens = run_tokens
        rng = np.random.default_rng(0)
        self._random_V = rng.integers(0, 2**64, vocab_size, dtype=np.uint64)
        base = int(rng.integers(0, 2**63)) * 2 + 1
        longest = BLOCK_TOKENS + run_tokens
        self._power_L = _powers(base, longest)
        self._inverse_L = _powers(pow(base, -1, 2**64), longest)

    def blocks(self, documents: Documents) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of documents end to end: (hashes of runs inside documents, the run's document), uint64
        and int64, block by block.
        """
        ends_N = documents.starts_N + documents.lengths_N
        tokens, n = documents.tokens, self.run_tokens
        for begin in range(0, len(tokens) - n + 1, BLOCK_TOKENS):
            block = tokens[begin : begin + BLOCK_TOKENS + n - 1]
            sums_L1 = np.zeros(len(block) + 1, np.uint64)
            np.cumsum(self._random_V[block] * self._power_L[: len(block)], out=sums_L1[1:])
            hash_W = (sums_L1[n:] - sums_L1[:-n]) * self._inverse_L[: len(block) - n + 1]
            start_W = np.arange(begin, begin + len(hash_W))
            first, last = np.searchsorted(ends_N, [begin, begin + len(hash_W) - 1], side="right")
            # Documents of the block's runs, by where each begins.
            bounds = np.clip(ends_N[first : last + 1], begin, begin + len(hash_W)) - begin
            document_W = np.repeat(np.arange(first, last + 1), np.diff(bounds, prepend=0))
            inside_W = start_W + n <= ends_N[document_W]
            yield hash_W[inside_W], document_W[inside_W]


def repeats_training(
    held_out: Documents, training: Documents, vocab_size: int, run_tokens: int
) -> np.ndarray:
    """bool [N]: the held-out document shares ``run_tokens`` tokens in a row with training text.

    Both end to end. Shorter documents share none.
    """
    hashes = RunHashes(vocab_size, run_tokens)
    repeats_N = np.zeros(len(held_out), bool)
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    waiting = 0
    passes = -(-len(held_out.tokens) // HELD_OUT_RUNS)
    with Progress("near-duplicates (tokens)", passes * len(training.tokens)) as progress:
        for hash_W, document_W in hashes.blocks(held_out):
            runs.append((hash_W, document_W))
            waiting += len(hash_W)
            if waiting >= HELD_OUT_RUNS:
                repeats_N |= _found(runs, training, hashes, len(held_out), progress)
                runs, waiting = [], 0
        return repeats_N | _found(runs, training, hashes, len(held_out), progress)


def _found(
    runs: list[tuple[np.ndarray, np.ndarray]],
    training: Documents,
    hashes: RunHashes,
    num_documents: int,
    progress: Progress,
) -> np.ndarray:
    repeats_N = np.zeros(num_documents, bool)
    if not runs:
        return repeats_N
    hash_W, document_W = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    wanted, index_W = np.unique(hash_W, return_inverse=True)
    if not len(wanted):
        return repeats_N
    shift = np.uint64(64 - _FILTER_BITS)
    # Most training runs are none of them: one look in a table tells.
    may_be = np.zeros(1 << _FILTER_BITS, bool)
    may_be[wanted >> shift] = True
    found = np.zeros(len(wanted), bool)
    for hash_T, _ in hashes.blocks(training):
        progress.add(len(hash_T))
        hash_T = hash_T[may_be[hash_T >> shift]]
        # Sorted, neighbours look in the same places.
        hash_T.sort()
        place_T = np.searchsorted(wanted, hash_T).clip(max=len(wanted) - 1)
        found[place_T[wanted[place_T] == hash_T]] = True
    repeats_N[document_W[found[index_W]]] = True
    return repeats_N


def _powers(base: int, count: int) -> np.ndarray:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
