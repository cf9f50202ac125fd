"""Bigram-Backcopy: the process, its oracle, and the corpus made of it."""

import math
import time

import numpy as np
import pytest

from data.backcopy import BackcopyProcess
from data.corpora import BigramBackcopyConfig, open_corpus
from data.documents import Documents
from data.packing import BosKind, Packer, PackingConfig
from data.tokenizers import BpeConfig
from kernels.errors import UserError
from models.batch import IGNORE_LABEL

TRIGGER = 4


def documents_of(*texts: list[int]) -> Documents:
    return Documents.end_to_end(np.concatenate(texts), np.cumsum([0, *map(len, texts)]))


@pytest.fixture
def text() -> Documents:
    """Tokens 1 to 5; 0 and 6 never occur, and 5 is only ever followed by the trigger."""
    rng = np.random.default_rng(0)
    body = rng.choice(4, 2000, p=[0.4, 0.3, 0.2, 0.1]) + 1
    return documents_of(body[:900], [5, 4, 1, 5, 4, 2], body[900:])


@pytest.fixture
def process(text) -> BackcopyProcess:
    return BackcopyProcess(text, vocab_size=7, trigger_ids=np.array([TRIGGER]))


def brute_force_table(text: Documents) -> np.ndarray:
    """P by counting, pair by pair; a row that leads only to the trigger is the unigram."""
    table = np.zeros((7, 7))
    for start, end in zip(text.starts_N, text.starts_N + text.lengths_N, strict=True):
        for a, b in zip(text.tokens[start:end], text.tokens[start + 1 : end], strict=False):
            table[a, b] += 1
    table[5] = np.bincount(text.tokens, minlength=7)
    return table / np.maximum(1, table.sum(1, keepdims=True))


def test_table_is_the_bigrams_within_documents(process, text):
    assert process.transition_VV() == pytest.approx(brute_force_table(text))


def test_triggers_copy_and_nothing_else_is_forced(process):
    tokens = process.sample(500, 40, np.random.default_rng(1)).tokens.reshape(500, 40)
    after, before = tokens[:, 2:], tokens[:, :-2]
    at_trigger = tokens[:, 1:-1] == TRIGGER
    assert at_trigger.sum() > 500
    assert (after[at_trigger] == before[at_trigger]).all()
    assert 0.1 < (after[~at_trigger] == before[~at_trigger]).mean() < 0.6
    # The token before a trigger, and so the copy, is never a trigger.
    assert (before[at_trigger] != TRIGGER).all()
    assert (tokens[:, 0] != TRIGGER).all()


def test_generated_bigrams_match_the_table(process, text):
    tokens = process.sample(4000, 64, np.random.default_rng(2)).tokens.reshape(4000, 64)
    last, following = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
    expected = brute_force_table(text)
    for token in (1, 2, 3, 5):
        counts = np.bincount(following[last == token], minlength=7)
        assert counts.sum() > 100
        error = 4 * np.sqrt(0.25 / counts.sum())
        assert counts / counts.sum() == pytest.approx(expected[token], abs=error)
    first = np.bincount(tokens[:, 0], minlength=7) / 4000
    unigram = np.bincount(text.tokens, minlength=7) * (np.arange(7) != TRIGGER)
    assert first == pytest.approx(unigram / unigram.sum(), abs=0.04)


def test_log_probabilities_against_brute_force(process, text):
    table = brute_force_table(text)
    unigram = np.bincount(text.tokens, minlength=7) * (np.arange(7) != TRIGGER)
    tokens = process.sample(20, 12, np.random.default_rng(3)).tokens.reshape(20, 12).astype(int)
    # One document that the process can't make: a copy that isn't one.
    tokens[0, :3] = [1, TRIGGER, 2]
    got = process.log_probabilities(tokens)
    for document, row in zip(tokens, got, strict=True):
        expected = [unigram[document[0]] / unigram.sum()]
        for i in range(1, 12):
            if document[i - 1] == TRIGGER:
                expected.append(float(document[i] == document[i - 2]))
            else:
                expected.append(table[document[i - 1], document[i]])
        with np.errstate(divide="ignore"):
            assert row == pytest.approx(np.log(expected))
    assert got[0, 2] == -math.inf


def test_stationary_loss_is_the_loss_far_from_the_start(process):
    documents = process.sample(3000, 200, np.random.default_rng(4))
    losses = -process.log_probabilities(documents.tokens.reshape(3000, 200))[:, 100:]
    assert process.stationary_loss() == pytest.approx(losses.mean(), abs=0.01)


def test_many_documents_come_in_well_under_a_second(process):
    """One vectorised step a position, not one a token."""
    start = time.perf_counter()
    process.sample(4096, 256, np.random.default_rng(0))
    assert time.perf_counter() - start < 2


@pytest.fixture
def config() -> BigramBackcopyConfig:
    return BigramBackcopyConfig(documents=64, validation_documents=32, document_tokens=30)


def test_epochs_are_fresh_and_seeds_repeat(config, cache_dir):
    def tokens(epoch, **changes):
        changed = BigramBackcopyConfig(**vars(config) | changes)
        corpus = open_corpus(changed, BpeConfig(vocab_size=400), cache_dir)
        return corpus.train.epoch(epoch).tokens.tolist(), corpus

    first, corpus = tokens(0)
    assert tokens(0)[0] == first
    others = [tokens(1)[0], tokens(0, seed=1)[0], corpus.validation.epoch(0).tokens.tolist()]
    assert len({tuple(other[:200]) for other in [first, *others]}) == 4
    assert corpus.validation.epoch(0) is corpus.validation.epoch(5)
    assert tokens(0, seed=1)[1].sha256 != corpus.sha256


def test_triggers_are_the_most_frequent_tokens_or_the_named_ones(config, cache_dir):
    corpus = open_corpus(config, BpeConfig(vocab_size=400), cache_dir)
    counts = np.bincount(corpus.store.train.tokens)
    assert set(corpus.process.trigger_ids) == set(np.argsort(counts)[-3:])
    config.triggers = [" the", ","]
    corpus = open_corpus(config, BpeConfig(vocab_size=400), cache_dir)
    named = [corpus.tokenizer.decode([index]) for index in corpus.process.trigger_ids]
    assert sorted(named) == [" the", ","]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_triggers": 400}, r"num_triggers must be below the \d+ tokens .* got 400"),
        ({"triggers": ["zebra crossing"]}, "triggers must be tokens .* got 'zebra crossing'"),
    ],
    ids=["too many", "not a token"],
)
def test_triggers_that_cannot_be_used_are_refused(config, cache_dir, change, message):
    config = BigramBackcopyConfig(**vars(config) | change)
    with pytest.raises(UserError, match=rf"^corpus\.{message}$"):
        open_corpus(config, BpeConfig(vocab_size=400), cache_dir)


def test_optimal_loss_is_that_of_the_canonical_labels(config, make_module):
    packing = PackingConfig(
        packer=Packer.single, bos=BosKind.pinned, eos=False, context=31, batch_tokens=31
    )
    module = make_module(packing, BpeConfig(vocab_size=400), corpus=config, canonical_rows=20)
    module.setup()
    process, losses = module.corpus.process, []
    for batch in module.canonical_batches():
        for tokens, labels in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True):
            log_probability = process.log_probabilities(np.array([tokens[1:]]))[0]
            assert [label for label in labels if label != IGNORE_LABEL] == tokens[2:]
            losses += (-log_probability[1:]).tolist()
    assert len(losses) == 20 * 29
    assert module.optimal_loss == pytest.approx(np.mean(losses))
    assert module.trigger_ids.tolist() == process.trigger_ids.tolist()
    assert 0 < module.optimal_loss < module.unigram_entropy
