"""What is written into rows, and training on fewer unique tokens."""

import dataclasses

import numpy as np
import pytest
import torch

from data.corpora import BigramBackcopyConfig, open_corpus
from data.evaluation import ProbeKind
from data.module import TokenDataModule
from data.packing import Packer, PackingConfig
from data.tokenizers import BpeConfig, CharactersConfig
from models.batch import IGNORE_LABEL, PackedBatch, RowCursor

ROWS = {"context": 16, "batch_tokens": 64}


def batches(module, num_batches: int = 3, rows: slice = slice(None)) -> list[PackedBatch]:
    module.setup()
    cursor, found = RowCursor(), []
    for _ in range(num_batches):
        request = module._stream.advance(cursor, module.packing.batch_rows)
        cursor = request.cursor
        own = request._replace(epoch_B=request.epoch_B[rows], row_B=request.row_B[rows])
        found.append(module._stream.batch(own))
    return found


@pytest.mark.parametrize("bos", ["none", "pinned"])
@pytest.mark.parametrize("position", [1, 15])
def test_a_fixed_token_stands_in_inputs_and_targets_and_changes_nothing_else(
    make_module, bos, position
):
    plain = make_module(PackingConfig(bos=bos, **ROWS))
    fixed = make_module(PackingConfig(bos=bos, fixed_position=position, fixed_token="t", **ROWS))
    for before, after in zip(batches(plain), batches(fixed), strict=True):
        token = fixed.tokenizer.token_id("t")
        tokens_BT, labels_BT = before.tokens_BT.clone(), before.labels_BT.clone()
        tokens_BT[:, position] = token
        labels_BT[:, position - 1] = token
        assert torch.equal(after.tokens_BT, tokens_BT)
        assert torch.equal(after.labels_BT, labels_BT)
        assert torch.equal(after.document_BT, before.document_BT)
        assert after.num_labels == before.num_labels
    own = fixed.own_batches()[0]
    assert (own.tokens_BT[own.document_BT[:, position] >= 0, position] == token).all()
    canonical = [module.canonical_batches()[0] for module in (plain, fixed)]
    assert torch.equal(canonical[0].tokens_BT, canonical[1].tokens_BT)


@pytest.mark.parametrize("bos", ["none", "document", "pinned"])
@pytest.mark.parametrize("position", [0, 1, 100, 127])
def test_held_out_prompts_are_left_as_they_are(make_module, bos, position):
    """Prompts are shorter than rows and may begin with a BOS where the arm has none."""
    if bos == "pinned" and position == 0:
        return
    written = [{"random_positions": [position]}]
    written.append({"fixed_position": position, "fixed_token": "t"})
    plain, *others = (
        make_module(PackingConfig(bos=bos, context=128, batch_tokens=512, **settings))
        for settings in ({}, *written)
    )
    for module in (plain, *others):
        module.setup()
    for other in others:
        for ours, theirs in (
            (plain.canonical_batches()[0], other.canonical_batches()[0]),
            *((plain.probe_batch(kind), other.probe_batch(kind)) for kind in ProbeKind),
        ):
            assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
            assert torch.equal(ours.labels_BT, theirs.labels_BT)
        assert len(other.own_batches()) > 0


def test_unknown_and_special_tokens_are_no_text(make_module):
    module = make_module(PackingConfig(**ROWS), tokenizer=CharactersConfig())
    module.setup()
    tokenizer = module.tokenizer
    text = [tokenizer.decode([index]) for index in tokenizer.text_ids.tolist()]
    assert all(len(character) == 1 for character in text)
    assert len(text) == tokenizer.vocab_size - 4
    assert tokenizer.token_id("\u20ac") is None and tokenizer.token_id("e") is not None


def test_padding_stays_padding(make_module):
    settings = {"packer": Packer.single, "context": 120, "batch_tokens": 1920}
    module = make_module(PackingConfig(fixed_position=60, fixed_token="t", **settings))
    batch = batches(module, num_batches=1)[0]
    padding_B = batch.document_BT[:, 60] < 0
    assert 0 < padding_B.sum() < len(padding_B)
    assert (batch.tokens_BT[padding_B, 60] == module.tokenizer.pad_id).all()
    assert (batch.labels_BT[padding_B, 59] == IGNORE_LABEL).all()


def test_random_tokens_are_any_text_token_and_a_function_of_the_row(make_module):
    packing = PackingConfig(random_positions=[0, 3], **ROWS)
    module = make_module(packing)
    together = batches(module, num_batches=300)
    # Another rank's rows, alone: nothing depends on what was drawn before.
    alone = batches(make_module(packing), num_batches=300, rows=slice(1, None, 2))
    for whole, half in zip(together, alone, strict=True):
        assert torch.equal(whole.tokens_BT[1::2], half.tokens_BT)
        is_token_B = whole.document_BT[:, 3] >= 0
        assert torch.equal(whole.labels_BT[is_token_B, 2], whole.tokens_BT[is_token_B, 3])
    tokens_BT = torch.cat([batch.tokens_BT for batch in together])
    is_token_BT = torch.cat([batch.document_BT for batch in together]) >= 0
    specials = {module.tokenizer.bos_id, module.tokenizer.eos_id, module.tokenizer.pad_id}
    for position in (0, 3):
        drawn = tokens_BT[is_token_BT[:, position], position].tolist()
        assert set(drawn).isdisjoint(specials)
        # 1,200 draws from 297 tokens: expected to leave five out, and none far too often.
        assert len(set(drawn)) > 270
        assert max(np.bincount(drawn)) < 20
    assert (tokens_BT[:, 0] != tokens_BT[:, 3]).any()
    other = torch.cat([b.tokens_BT for b in batches(make_module(packing, data_seed=1), 300)])
    assert (other[:, 0] != tokens_BT[:, 0]).float().mean() > 0.9
    # The second epoch draws anew.
    rows = module._stream.epoch(0).plan.num_rows
    assert rows < 1200 and (tokens_BT[rows:, 0] != tokens_BT[: 1200 - rows, 0]).float().mean() > 0.9


@pytest.mark.parametrize("unique_tokens", [1, 500, 1000])
def test_unique_tokens_are_exact_and_leave_the_rest_alone(files_config, cache_dir, unique_tokens):
    full = open_corpus(files_config, BpeConfig(vocab_size=300), cache_dir)
    config = dataclasses.replace(files_config, unique_tokens=unique_tokens)
    fewer = open_corpus(config, BpeConfig(vocab_size=300), cache_dir)
    documents, everything = fewer.train.epoch(0), full.train.epoch(0)
    assert documents.lengths_N.sum() == unique_tokens
    whole = dict(zip(everything.starts_N.tolist(), everything.lengths_N.tolist(), strict=True))
    lengths = documents.lengths_N.tolist()
    kept = [whole[start] for start in documents.starts_N.tolist()]
    assert lengths[:-1] == kept[:-1] and 1 <= lengths[-1] <= kept[-1]
    assert len(set(documents.starts_N.tolist())) == len(documents)
    assert fewer.tokenizer.sha256 == full.tokenizer.sha256
    assert fewer.store.sha256 == full.store.sha256 and fewer.sha256 != full.sha256
    validation, same = fewer.validation.epoch(0), full.validation.epoch(0)
    assert validation.tokens.tobytes() == same.tokens.tobytes()
    assert np.array_equal(validation.lengths_N, same.lengths_N)


def test_fewer_unique_tokens_are_part_of_more_and_come_again(files_config, cache_dir, make_module):
    few, more = (
        open_corpus(
            dataclasses.replace(files_config, unique_tokens=unique_tokens),
            BpeConfig(vocab_size=300),
            cache_dir,
        ).train.epoch(0)
        for unique_tokens in (500, 2000)
    )
    assert np.array_equal(few.starts_N, more.starts_N[: len(few)])

    module = make_module(
        PackingConfig(eos=False, **ROWS),
        corpus=dataclasses.replace(files_config, unique_tokens=160),
    )
    module.setup()
    stream = module._stream
    epochs = []
    cursor = RowCursor()
    for _ in range(3):
        request = stream.advance(cursor, 10)
        cursor = request.cursor
        epochs.append(stream.batch(request).tokens_BT)
    assert cursor == RowCursor(3, 0, 30)
    counts = [torch.bincount(tokens_BT.ravel()) for tokens_BT in epochs]
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("packer", Packer)
@pytest.mark.parametrize("bos", ["document", "pinned"])
def test_what_was_seen_is_counted(make_module, packer, bos):
    """Against a count of the text tokens in the rows themselves."""
    module = make_module(PackingConfig(packer=packer, bos=bos, **ROWS))
    assert module.seen(RowCursor()) == (0, 0, 0.0, 0)
    specials = torch.tensor([module.tokenizer.bos_id, module.tokenizer.eos_id])
    rows = module._stream.epoch(0).plan.num_rows
    cursor, text_tokens = RowCursor(), 0
    while cursor.epoch < 2:
        request = module._stream.advance(cursor, min(7, rows - cursor.row))
        batch = module._stream.batch(request)
        if cursor.epoch == 0:
            is_text_BT = (batch.document_BT >= 0) & ~torch.isin(batch.tokens_BT, specials)
            text_tokens += int(is_text_BT.sum())
        cursor = request.cursor
        assert module.seen(cursor).unique_tokens == text_tokens
        assert module.seen(cursor).passes == pytest.approx(cursor.rows / rows)
    assert module.seen(cursor) == (2, 2 * rows, 2.0, text_tokens)
    if packer is Packer.chunk:
        assert text_tokens == len(module.corpus.store.train.tokens)


def test_fresh_documents_are_all_unique(cache_dir):
    corpus = BigramBackcopyConfig(documents=20, document_tokens=16, validation_documents=4)
    module = TokenDataModule(
        corpus, BpeConfig(vocab_size=300), PackingConfig(eos=False, **ROWS), cache_dir=cache_dir
    )
    assert module.seen(RowCursor(0, 5, 5)).unique_tokens == 80
    assert module.seen(RowCursor(2, 5, 45)).unique_tokens == 720
    assert module.seen(RowCursor(3, 0, 60)).unique_tokens == 960
    # Whatever was asked before.
    assert module.seen(RowCursor(1, 5, 25)).unique_tokens == 400


def test_prompts_with_what_is_written(make_module):
    """As in training rows: the fixed token everywhere, random ones anew in each prompt."""
    plain = make_module(PackingConfig(context=128, batch_tokens=128))
    plain.setup()
    text = plain.probe_batch(ProbeKind.text, 64, 8)
    assert plain.written(text) is None
    settings = {"fixed_position": 2, "fixed_token": "t", "random_positions": [0]}
    module = make_module(PackingConfig(context=128, batch_tokens=128, **settings))
    module.setup()
    before_BT = text.tokens_BT.clone()
    written = module.written(text)
    assert torch.equal(text.tokens_BT, before_BT), "the prompts themselves are left alone"
    assert (written.tokens_BT[:, 2] == module.tokenizer.token_id("t")).all()
    assert len(written.tokens_BT[:, 0].unique()) > 2
    others = [t for t in range(64) if t not in (0, 2)]
    assert torch.equal(written.tokens_BT[:, others], before_BT[:, others])
    assert (written.labels_BT == IGNORE_LABEL).all() and written.num_labels == 0
    assert torch.equal(written.tokens_BT, module.written(text).tokens_BT)
    far = make_module(
        PackingConfig(context=128, batch_tokens=128, fixed_position=100, fixed_token="t")
    )
    far.setup()
    assert far.written(text) is None
