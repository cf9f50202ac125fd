"""Masks against the definition, spelled out key by key, and against rows written by hand."""

import pytest
import torch

from kernels.errors import UserError
from kernels.masks import DenseMask, IntervalMask

DOCUMENTS = [
    [1, 1, 1, 2, 3, 4, 4, 4],
    [1, 2, 2, 2, 2, 2, -1, -1],
    [-1, -1, -1, -1, -1, -1, -1, -1],
]
WITH_BOS = [
    [0, 1, 1, 2, 3, 4, 4, 4],
    [0, 2, 2, 2, 2, 2, -1, -1],
    [-1, -1, -1, -1, -1, -1, -1, -1],
]


def documents(rows, **settings) -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor(rows, dtype=torch.int32), **settings)


def by_definition(mask: IntervalMask) -> torch.Tensor:
    B, T = mask.start_BT.shape
    start, stop = mask.start_BT.tolist(), mask.stop_BT.tolist()
    return torch.tensor(
        [
            [
                [j < stop[b][i] and (j < mask.pinned or j >= start[b][i]) for j in range(T)]
                for i in range(T)
            ]
            for b in range(B)
        ]
    )


MASKS = {
    "causal": IntervalMask.causal(2, 7),
    "documents": documents(DOCUMENTS),
    "causal_across": documents(DOCUMENTS, causal_across=True),
    "pinned": documents(WITH_BOS, pinned=1),
    "window": IntervalMask.causal(2, 7).window(3),
    "window-1": IntervalMask.causal(2, 7).window(1),
    "window-documents": documents(DOCUMENTS).window(2),
    "window-pinned": documents(WITH_BOS, pinned=1).window(2),
    "prefix": IntervalMask.causal(2, 7).prefix(4),
    "prefix-documents": documents(DOCUMENTS).prefix(2),
    "prefix-window-pinned": documents(WITH_BOS, pinned=1).window(2).prefix(3),
}


@pytest.fixture(params=MASKS)
def mask(request) -> IntervalMask:
    return MASKS[request.param]


def test_dense_is_the_definition(mask):
    assert torch.equal(mask.dense_BTS(), by_definition(mask))


def test_counts_are_those_of_the_dense_mask(mask):
    visible_BTS = by_definition(mask)
    assert torch.equal(mask.queries_per_key_BS(), visible_BTS.sum(1))
    assert torch.equal(mask.keys_per_query_BT(), visible_BTS.sum(2))


def test_sees_reads_one_key_a_query(mask):
    visible_BTS = by_definition(mask)
    B, T, _ = visible_BTS.shape
    for key in range(-1, T):
        expected_BT = visible_BTS[:, :, key] if key >= 0 else torch.zeros(B, T, dtype=torch.bool)
        key_BT = torch.full((B, T), key, dtype=torch.int32)
        assert torch.equal(mask.sees_BT(key_BT), expected_BT)
        assert torch.equal(mask.to_dense().sees_BT(key_BT), expected_BT)


def test_the_dense_mask_answers_alike(mask):
    dense = mask.to_dense()
    assert torch.equal(dense.dense_BTS(), mask.dense_BTS())
    assert torch.equal(dense.queries_per_key_BS(), mask.queries_per_key_BS())
    assert torch.equal(dense.keys_per_query_BT(), mask.keys_per_query_BT())
    assert torch.equal(dense.document_start_BT, mask.document_start_BT)
    assert torch.equal(dense.window(2).dense_BTS(), mask.window(2).dense_BTS())


def test_to_moves_every_tensor(mask):
    moved = mask.to("meta")
    assert {moved.start_BT.device.type, moved.stop_BT.device.type} == {"meta"}
    assert moved.document_start_BT.device.type == "meta"
    assert (moved.pinned, moved.is_causal) == (mask.pinned, mask.is_causal)
    assert moved.window(2).start_BT.shape == mask.start_BT.shape
    assert mask.to_dense().to("meta").visible_BTS.device.type == "meta"


def test_documents_written_by_hand():
    mask = documents(DOCUMENTS)
    assert mask.start_BT.tolist() == [
        [0, 0, 0, 3, 4, 5, 5, 5],
        [0, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert mask.stop_BT.tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 3, 4, 5, 6, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert mask.document_start_BT.tolist() == [
        [0, 0, 0, 3, 4, 5, 5, 5],
        [0, 1, 1, 1, 1, 1, -1, -1],
        [-1, -1, -1, -1, -1, -1, -1, -1],
    ]
    assert mask.start_BT.dtype == mask.stop_BT.dtype == mask.document_start_BT.dtype == torch.int32
    assert (mask.pinned, mask.is_causal) == (0, False)


def test_pinned_bos_written_by_hand():
    mask = documents(WITH_BOS, pinned=1)
    assert mask.dense_BTS()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert not mask.dense_BTS()[1, 6:].any() and not mask.dense_BTS()[2].any()
    assert mask.document_start_BT[0].tolist() == [0, 1, 1, 3, 4, 5, 5, 5]


def test_causal_across_keeps_documents_and_empties_padding():
    mask = documents(DOCUMENTS, causal_across=True)
    assert mask.start_BT.eq(0).all()
    assert mask.stop_BT[1].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert torch.equal(mask.document_start_BT, documents(DOCUMENTS).document_start_BT)


def test_window_written_by_hand():
    mask = documents([[0, 1, 1, 1, 1, 2]], pinned=1).window(2)
    assert mask.dense_BTS()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


def test_prefix_stops_at_the_documents_end():
    mask = documents([[1, 1, 1, 1, 2, 2, 3, -1]]).prefix(3)
    assert mask.stop_BT.tolist() == [[3, 3, 3, 4, 6, 6, 7, 0]]
    assert torch.equal(mask.prefix(0).stop_BT, mask.stop_BT)
    assert documents([[1, 1, 1]]).prefix(9).dense_BTS().all()


def test_prefix_of_rows_crosses_documents():
    mask = documents([[1, 1, 1, 2, 2, -1]], causal_across=True).prefix(4, of_row=True)
    assert mask.stop_BT.tolist() == [[4, 4, 4, 4, 5, 0]]
    short = documents([[1, 2, -1, -1]], causal_across=True).prefix(3, of_row=True)
    assert short.stop_BT.tolist() == [[2, 2, 0, 0]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (IntervalMask.causal(2, 5), True),
        (documents([[1, 1, 1], [4, 4, 4]]), True),
        (documents([[0, 1, 2]], causal_across=True), True),
        (documents([[1, 1, 2]]), False),
        (documents([[1, 1, -1]], causal_across=True), False),
        (IntervalMask.causal(2, 5).window(5), True),
        (IntervalMask.causal(2, 5).window(4), False),
        (IntervalMask.causal(2, 5).prefix(1), True),
        (IntervalMask.causal(2, 5).prefix(2), False),
    ],
)
def test_is_causal_is_set_for_exactly_the_causal_mask(mask, expected):
    causal_TS = torch.ones(mask.num_tokens, mask.num_tokens, dtype=torch.bool).tril()
    assert mask.is_causal is expected
    assert bool((mask.dense_BTS() == causal_TS).all()) is expected


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (IntervalMask.causal(2, 5), True),
        (IntervalMask.causal(1, 4, torch.tensor([[0, 0, 2, 2]]).int()), False),
        (documents([[1, 1, 1], [4, -1, -1], [-1, -1, -1]]), True),
        (documents([[1, 1, 1], [1, 1, 2]], causal_across=True), False),
        (documents([[0, 1, 1]], pinned=1), False),
        (IntervalMask.causal(2, 5).window(2).prefix(3).to("meta"), True),
        (documents([[1, 1, 2]]).window(1), False),
    ],
)
def test_one_document_is_set_where_key_0_begins_every_document(mask, expected):
    assert mask.one_document is expected


def interval(start, stop, document_start=None, **settings):
    zeros = torch.zeros(1, len(start), dtype=torch.int32)
    start, stop = torch.tensor([start]).int(), torch.tensor([stop]).int()
    first = zeros if document_start is None else torch.tensor([document_start]).int()
    return IntervalMask(start_BT=start, stop_BT=stop, document_start_BT=first, **settings)


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def dense(visible, first):
    return DenseMask(visible_BTS=visible, document_start_BT=first)


WRONG = {
    "negative_start": (lambda: interval([-1, 0], [1, 2]), "mask.start must be >= 0, got [-1, 0]"),
    "start_after_stop": (lambda: interval([0, 2], [1, 1]), "mask.start must be <= stop"),
    "stop_after_end": (lambda: interval([0, 0], [1, 3]), "mask.stop must be <= T = 2, got [1, 3]"),
    "pinned_2": (lambda: interval([0, 0], [1, 2], pinned=2), "mask.pinned must be 0 or 1, got 2"),
    "document_below_-1": (lambda: interval([0], [1], [-2]), "mask.document_start must be >= -1"),
    "document_later": (lambda: interval([0, 0], [1, 2], [1, 1]), "must not lie after its query"),
    "padding_sees": (lambda: interval([0, 0], [1, 2], [0, -1]), "must be 0 on padding"),
    "not_causal": (lambda: interval([0, 1], [1, 2], is_causal=True), "where is_causal is set"),
    "two_documents": (
        lambda: interval([0, 1], [1, 2], [0, 1], one_document=True),
        "must be 0, or -1 on padding, where one_document is set, got [0, 1]",
    ),
    "dtype": (
        lambda: IntervalMask(
            start_BT=int32(1, 2).long(), stop_BT=int32(1, 2), document_start_BT=int32(1, 2)
        ),
        "mask.start must be int32, got torch.int64",
    ),
    "shapes": (
        lambda: IntervalMask(
            start_BT=int32(1, 2), stop_BT=int32(1, 3), document_start_BT=int32(1, 2)
        ),
        "mask.stop must have the shape of start, (1, 2), got (1, 3)",
    ),
    "axes": (
        lambda: IntervalMask(start_BT=int32(2), stop_BT=int32(2), document_start_BT=int32(2)),
        "mask.start must be [B, T], got (2,)",
    ),
    "no_tokens": (lambda: IntervalMask.causal(1, 0), "mask.num_tokens must be >= 1, got 0"),
    "no_rows": (lambda: IntervalMask.causal(0, 1), "mask.batch_size must be >= 1, got 0"),
    "window_0": (lambda: IntervalMask.causal(1, 2).window(0), "attention.window must be >= 1"),
    "prefix_-1": (lambda: IntervalMask.causal(1, 2).prefix(-1), "packing.prefix must be >= 0"),
    "document_-2": (lambda: documents([[1, -2]]), "mask.document must be >= -1, got [1, -2]"),
    "bos_inside": (lambda: documents([[1, 1], [1, 0]]), "got [1, 0] in row 1"),
    "padding_inside": (lambda: documents([[1, -1, 1]]), "-1, padding, must end its row"),
    "pinned_document": (lambda: documents([[1, 1]], pinned=1), "must be 0 at position 0"),
    "flat_documents": (lambda: documents([1, 1]), "mask.document must be [B, T], got (2,)"),
    "float_documents": (
        lambda: IntervalMask.from_documents(torch.ones(1, 2)),
        "mask.document must be integers",
    ),
    "dense_dtype": (lambda: dense(int32(1, 2, 2), int32(1, 2)), "mask.visible must be bool"),
    "dense_shape": (lambda: dense(int32(1, 2, 3).bool(), int32(1, 2)), "must be [B, T, T]"),
    "dense_documents": (
        lambda: dense(int32(1, 2, 2).bool(), int32(1, 3)),
        "mask.document_start must be int32 (1, 2)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mask_names_the_rule(wrong):
    build, message = WRONG[wrong]
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_rows_are_cut_in_messages():
    with pytest.raises(UserError) as caught:
        documents([[1] * 500 + [-2]])
    assert len(str(caught.value)) < 150


def test_masks_work_in_compiled_code():
    """Compiled code reads a batch's mask and derives others from it without a graph break."""

    def counted(mask):
        windowed = mask.window(3)
        return windowed.dense_BTS(), windowed.queries_per_key_BS(), windowed.keys_per_query_BT()

    mask = documents(WITH_BOS, pinned=1)
    compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(mask), counted(mask), strict=True):
        assert torch.equal(ours, expected)
