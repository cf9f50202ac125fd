"""What holds for every packing of every set of documents, and the figures of best fit.

Text tokens are unique (token t of the corpus is 100 + t), so a token says which document it is of
and where in it; BOS is 1, EOS 2, PAD 0.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.best_fit import BUFFER_PIECES, pack_best_fit
from data.documents import Documents, FixedDocuments
from data.packing import (
    BosKind,
    MaskKind,
    Packer,
    PackingConfig,
    PositionKind,
    plan_epoch,
    plan_in_order,
)
from data.plan import pack_chunk
from data.report import packing_report
from data.rows import SpecialIds, finish_rows, gather_rows
from data.stream import TrainingStream
from models.batch import IGNORE_LABEL, RowCursor

SPECIALS = SpecialIds(bos=1, eos=2, pad=0)


def numbered(lengths: list[int]) -> Documents:
    """Documents of these text lengths with unique tokens."""
    return Documents.end_to_end(100 + np.arange(sum(lengths)), np.cumsum([0, *lengths]))


@st.composite
def packings(draw) -> tuple[Documents, PackingConfig]:
    context = draw(st.integers(3, 20))
    bos = draw(st.sampled_from(BosKind))
    config = PackingConfig(
        packer=draw(st.sampled_from(Packer)),
        mask=draw(st.sampled_from(MaskKind)),
        bos=bos,
        eos=draw(st.booleans()),
        positions=draw(st.sampled_from(PositionKind)),
        context=context,
        batch_tokens=context * draw(st.integers(1, 5)),
        prefix=draw(st.integers(0, context - 1)) * draw(st.booleans()),
        loss_from=draw(st.integers(0, context - 1)) * draw(st.booleans()),
        loss_at_bos=bos is BosKind.none or draw(st.booleans()),
    )
    return numbered(draw(st.lists(st.integers(1, 50), min_size=1, max_size=30))), config


def with_specials(documents: Documents, config: PackingConfig) -> list[list[int]]:
    """Each document's tokens as they are to be packed."""
    bos = [1] * (config.bos is BosKind.document)
    eos = [2] * config.eos
    pieces = np.split(documents.tokens, documents.starts_N[1:])
    return [[*bos, *piece.tolist(), *eos] for piece in pieces]


@settings(max_examples=150, deadline=None)
@given(packings(), st.integers(0, 3))
def test_rows_hold_documents_in_order_and_lose_only_what_is_counted(packing, epoch):
    documents, config = packing
    whole = with_specials(documents, config)
    plan = plan_epoch(documents.lengths_N, config, 7, epoch)
    batch = finish_rows(gather_rows(documents, plan, config, SPECIALS), config, num_labels=0)
    segment = 0
    kept = 0
    for row in range(plan.num_rows):
        tokens, numbers = batch.tokens_BT[row].tolist(), batch.document_BT[row].tolist()
        if config.pinned:
            assert (tokens.pop(0), numbers.pop(0)) == (1, 0)
        used = [number for number in numbers if number >= 0]
        assert used == sorted(used) and numbers[len(used) :] == [-1] * (len(numbers) - len(used))
        for number in dict.fromkeys(used):
            piece = [token for token, n in zip(tokens, numbers, strict=True) if n == number]
            document, offset = int(plan.document_S[segment]), int(plan.offset_S[segment])
            assert piece == whole[document][offset : offset + len(piece)]
            segment += 1
            kept += len(piece)
    assert segment == len(plan.document_S)
    # No token is in two rows: pieces of a document don't overlap.
    places = [
        (d, o + i)
        for d, o, n in zip(plan.document_S, plan.offset_S, plan.length_S, strict=True)
        for i in range(n)
    ]
    assert len(set(places)) == len(places) == kept
    report = packing_report(plan, documents.lengths_N, config)
    assert kept + report.tokens_cropped == sum(map(len, whole)) == report.tokens
    if config.packer is Packer.chunk:
        assert report.tokens_cropped == 0
    if config.packer is not Packer.single:
        # Full rows: padding in one row at most.
        assert report.tokens_padded < config.capacity


@settings(max_examples=150, deadline=None)
@given(packings())
def test_labels_are_the_next_token_and_never_cross_a_masked_boundary(packing):
    documents, config = packing
    whole = with_specials(documents, config)
    plan = plan_in_order(documents.lengths_N, config)
    batch = finish_rows(gather_rows(documents, plan, config, SPECIALS), config, num_labels=0)
    causal = config.mask is MaskKind.causal
    labels_R = plan.labels_R(config.labels)
    assert ((batch.labels_BT != IGNORE_LABEL).sum(1).numpy() == labels_R).all()
    for row in range(plan.num_rows):
        own = slice(*plan.row_offsets_R1[row : row + 2])
        last_document = int(plan.document_S[own][-1])
        end = int(plan.offset_S[own][-1] + plan.length_S[own][-1])
        numbers = batch.document_BT[row].tolist()
        tokens, labels = batch.tokens_BT[row].tolist(), batch.labels_BT[row].tolist()
        used = sum(number >= 0 for number in numbers)
        for i in range(config.context):
            if i >= used:
                expected = IGNORE_LABEL
            elif i + 1 < used:
                sees = causal or numbers[i] == numbers[i + 1] or (config.pinned and i == 0)
                expected = tokens[i + 1] if sees else IGNORE_LABEL
            elif end < len(whole[last_document]):
                expected = whole[last_document][end]
            elif causal and config.packer is Packer.chunk and row + 1 < plan.num_rows:
                expected = whole[last_document + 1][0]
            else:
                expected = IGNORE_LABEL
            is_bos = tokens[i] == 1 and (config.loss_at_bos is False)
            if i < config.loss_from or is_bos or _predicts_prefix(config, numbers, i):
                expected = IGNORE_LABEL
            assert labels[i] == expected


def _predicts_prefix(config, numbers, i):
    """Whether the token after position i is one of a prefix that i sees."""
    if config.mask is MaskKind.causal:
        return i + 1 < config.prefix
    return numbers[i] > 0 and i - numbers.index(numbers[i]) + 1 < config.prefix


@settings(max_examples=100, deadline=None)
@given(packings())
def test_masks_cross_documents_only_if_asked(packing):
    documents, config = packing
    plan = plan_in_order(documents.lengths_N, config)
    batch = finish_rows(gather_rows(documents, plan, config, SPECIALS), config, num_labels=0)
    document_BT = batch.document_BT
    is_token_BT = document_BT >= 0
    visible_BTS = batch.mask.dense_BTS()
    earlier_BTS = visible_BTS.new_ones(config.context, config.context).tril()[None]
    index_T = torch.arange(config.context)
    first_BT = batch.mask.document_start_BT * (config.mask is MaskKind.document)
    in_prefix_BT = index_T - first_BT < config.prefix
    both_BTS = in_prefix_BT[:, :, None] & in_prefix_BT[:, None]
    expected_BTS = earlier_BTS | both_BTS
    expected_BTS = expected_BTS & is_token_BT[:, :, None] & is_token_BT[:, None]
    if config.mask is MaskKind.document:
        may_see_BTS = document_BT[:, :, None] == document_BT[:, None]
        may_see_BTS[:, :, 0] |= bool(config.pinned)
        expected_BTS &= may_see_BTS
    assert (visible_BTS == expected_BTS).all()
    report = packing_report(plan, documents.lengths_N, config)
    assert report.mean_keys == pytest.approx(float(visible_BTS.sum() / is_token_BT.sum()))


@settings(max_examples=60, deadline=None)
@given(packings(), st.integers(0, 80))
def test_resume_from_any_row_goes_on_exactly(packing, consumed):
    documents, config = packing

    def stream():
        return TrainingStream(FixedDocuments(documents), config, SPECIALS, data_seed=3)

    straight, cursor = stream(), RowCursor()
    for _ in range(consumed):
        cursor = straight.advance(cursor, 1).cursor
    assert cursor.rows == consumed
    expected = straight.batch(straight.advance(cursor, config.batch_rows))
    resumed = stream()
    batch = resumed.batch(resumed.advance(RowCursor(*cursor), config.batch_rows))
    assert batch.tokens_BT.tolist() == expected.tokens_BT.tolist()
    assert batch.labels_BT.tolist() == expected.labels_BT.tolist()
    assert batch.cursor == expected.cursor
    assert batch.num_labels == max(1, int((batch.labels_BT != IGNORE_LABEL).sum()))


def test_order_is_a_function_of_seed_and_epoch():
    documents = numbered([3] * 50)
    config = PackingConfig(packer=Packer.single, context=8, batch_tokens=8)

    def order(seed, epoch):
        return plan_epoch(documents.lengths_N, config, seed, epoch).document_S.tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(0, 0)), tuple(order(0, 1)), tuple(order(1, 0))}) == 3
    assert sorted(order(0, 1)) == list(range(50))


@pytest.mark.parametrize("bos", BosKind)
@pytest.mark.parametrize("mask", MaskKind)
def test_document_order_does_not_depend_on_the_packing(mask, bos):
    """The six cells of a study see their documents in one order: rows undo only a permutation."""
    documents = numbered([40] * 30)
    config = PackingConfig(mask=mask, bos=bos, eos=False, context=20, batch_tokens=20)
    rng = np.random.default_rng([5, 2])
    order = rng.permutation(30)
    plan = plan_epoch(documents.lengths_N, config, 5, 2)
    in_order = plan.take(np.argsort(rng.permutation(plan.num_rows)))
    assert list(dict.fromkeys(in_order.document_S.tolist())) == order.tolist()


def short_documents(num_documents: int) -> np.ndarray:
    """Mostly short: median 80 tokens, a long tail."""
    rng = np.random.default_rng(0)
    return np.maximum(20, rng.lognormal(4.4, 0.9, num_documents)).astype(np.int64)


@pytest.mark.parametrize("capacity", [512, 2048])
def test_best_fit_cuts_at_most_a_third_of_what_chunk_cuts(capacity):
    length_N = short_documents(30_000)

    def documents_cut(plan):
        return len(np.unique(plan.document_S[plan.length_S < length_N[plan.document_S]]))

    best_fit, chunk = pack_best_fit(length_N, capacity), pack_chunk(length_N, capacity)
    assert documents_cut(chunk) > 1000
    assert documents_cut(best_fit) <= documents_cut(chunk) / 3
    assert best_fit.length_S.sum() >= 0.99 * length_N.sum()
    assert (best_fit.tokens_R < capacity).sum() <= 1


def test_best_fit_waits_for_a_piece_in_a_bounded_buffer():
    """A fitting document beyond the buffer isn't seen: memory and order stay bounded."""
    capacity = 10
    length_N = np.array([6, 9] + [9] * BUFFER_PIECES + [4])
    plan = pack_best_fit(length_N, capacity)
    row_of_six = np.searchsorted(
        plan.row_offsets_R1, np.flatnonzero(plan.document_S == 0)[0], "right"
    )
    row = slice(*plan.row_offsets_R1[row_of_six - 1 : row_of_six + 1])
    assert plan.tokens_R[row_of_six - 1] == capacity
    assert len(length_N) - 1 not in plan.document_S[row]
