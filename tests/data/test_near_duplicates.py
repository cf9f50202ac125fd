"""Held-out documents that share a run of tokens with training text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import near_duplicates
from data.documents import Documents
from data.near_duplicates import repeats_training

RUN = 3
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def documents(lists: list[list[int]]) -> Documents:
    tokens = np.array([token for tokens in lists for token in tokens], np.uint16)
    return Documents.end_to_end(tokens, np.cumsum([0, *map(len, lists)]))


def runs_of(document: list[int]) -> set[tuple[int, ...]]:
    return {tuple(document[i : i + RUN]) for i in range(len(document) - RUN + 1)}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(texts, texts, st.sampled_from([1, 2, 5, 1 << 20]), st.sampled_from([1, 4, 1 << 24]))
def test_against_brute_force(held_out, training, block, runs_a_pass):
    """Runs across two documents are no runs; blocks and passes of any size change nothing."""
    wanted = set().union(*map(runs_of, training))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(near_duplicates, "BLOCK_TOKENS", block)
        monkeypatch.setattr(near_duplicates, "HELD_OUT_RUNS", runs_a_pass)
        found_N = repeats_training(documents(held_out), documents(training), 3, RUN)
    assert found_N.tolist() == [bool(runs_of(document) & wanted) for document in held_out]
