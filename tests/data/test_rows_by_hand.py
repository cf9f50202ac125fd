"""Whole rows written out by hand, for every packer, mask and BOS.

Rows of 6 tokens, BOS 1, EOS 2, PAD 0; `|` separates rows, `.` is no label. Documents are 10 to 16
and, for chunk and single, 20 21 and 30 31 32; for best_fit 20 to 23 and 30 to 33.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from data.documents import Documents
from data.packing import BosKind, MaskKind, Packer, PackingConfig, PositionKind, plan_in_order
from data.report import packing_report
from data.rows import SpecialIds, finish_rows, gather_rows
from models.batch import IGNORE_LABEL

SPECIALS = SpecialIds(bos=1, eos=2, pad=0)
TEXT = {
    "chunk": [range(10, 17), range(20, 22), range(30, 33)],
    "best_fit": [range(10, 17), range(20, 24), range(30, 34)],
    "single": [range(10, 17), range(20, 22), range(30, 33)],
}


@dataclass(kw_only=True)
class ByHand:
    """Rows of one packer and BOS; labels and intervals for both masks."""

    packer: str
    bos: str
    eos: bool
    positions_kind: str
    tokens: str
    documents: str
    begins: str
    positions: str
    document_start: str
    stop: str
    causal_labels: str
    causal_start: str
    document_labels: str
    document_start_of_interval: str
    cropped: int
    cut: int


CASES = [
    # The first document is cut over rows 0 and 1, the third over rows 1 and 2.
    ByHand(
        packer="chunk",
        bos="none",
        eos=True,
        positions_kind="row",
        tokens="        10 11 12 13 14 15 | 16  2 20 21  2 30 | 31 32  2  0  0  0",
        documents="      1  1  1  1  1  1 |  1  1  2  2  2  3 |  1  1  1 -1 -1 -1",
        begins="         1  1  1  1  1  1 |  0  0  1  1  1  1 |  0  0  0  0  0  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  5 |  0  1  2  3  4  5",
        document_start=" 0  0  0  0  0  0 |  0  0  2  2  2  5 |  0  0  0 -1 -1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  0  0  0",
        causal_labels=" 11 12 13 14 15 16 |  2 20 21  2 30 31 | 32  2  .  .  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="11 12 13 14 15 16 |  2  . 21  2  . 31 | 32  2  .  .  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 2 2 2 5 | 0 0 0 0 0 0",
        cropped=0,
        cut=2,
    ),
    # A document's BOS may be the last token of a row.
    ByHand(
        packer="chunk",
        bos="document",
        eos=False,
        positions_kind="document",
        tokens="         1 10 11 12 13 14 | 15 16  1 20 21  1 | 30 31 32  0  0  0",
        documents="      1  1  1  1  1  1 |  1  1  2  2  2  3 |  1  1  1 -1 -1 -1",
        begins="         1  1  1  1  1  1 |  0  0  1  1  1  1 |  0  0  0  0  0  0",
        positions="      0  1  2  3  4  5 |  0  1  0  1  2  0 |  0  1  2  0  0  0",
        document_start=" 0  0  0  0  0  0 |  0  0  2  2  2  5 |  0  0  0 -1 -1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  0  0  0",
        causal_labels=" 10 11 12 13 14 15 | 16  1 20 21  1 30 | 31 32  .  .  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 16  . 20 21  . 30 | 31 32  .  .  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 2 2 2 5 | 0 0 0 0 0 0",
        cropped=0,
        cut=2,
    ),
    # The pinned BOS is labelled with the row's first token, even in the middle of a document.
    ByHand(
        packer="chunk",
        bos="pinned",
        eos=False,
        positions_kind="document",
        tokens="         1 10 11 12 13 14 |  1 15 16 20 21 30 |  1 31 32  0  0  0",
        documents="      0  1  1  1  1  1 |  0  1  1  2  2  3 |  0  1  1 -1 -1 -1",
        begins="         0  1  1  1  1  1 |  0  0  0  1  1  1 |  0  0  0  0  0  0",
        positions="      0  1  2  3  4  5 |  0  1  2  1  2  1 |  0  1  2  0  0  0",
        document_start=" 0  1  1  1  1  1 |  0  1  1  3  3  5 |  0  1  1 -1 -1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  0  0  0",
        causal_labels=" 10 11 12 13 14 15 | 15 16 20 21 30 31 | 31 32  .  .  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 15 16  . 21  . 31 | 31 32  .  .  .  .",
        document_start_of_interval="0 1 1 1 1 1 | 0 1 1 3 3 5 | 0 1 1 0 0 0",
        cropped=0,
        cut=2,
    ),
    # The rest of the first document (16, EOS) is cropped to the gap of one token.
    ByHand(
        packer="best_fit",
        bos="none",
        eos=True,
        positions_kind="document",
        tokens="        10 11 12 13 14 15 | 30 31 32 33  2 16 | 20 21 22 23  2  0",
        documents="      1  1  1  1  1  1 |  1  1  1  1  1  2 |  1  1  1  1  1 -1",
        begins="         1  1  1  1  1  1 |  1  1  1  1  1  0 |  1  1  1  1  1  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  0 |  0  1  2  3  4  0",
        document_start=" 0  0  0  0  0  0 |  0  0  0  0  0  5 |  0  0  0  0  0 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  4  5  0",
        causal_labels=" 11 12 13 14 15 16 | 31 32 33  2 16  2 | 21 22 23  2  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="11 12 13 14 15 16 | 31 32 33  2  .  2 | 21 22 23  2  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 0 0 0 5 | 0 0 0 0 0 0",
        cropped=1,
        cut=1,
    ),
    ByHand(
        packer="best_fit",
        bos="document",
        eos=False,
        positions_kind="row",
        tokens="         1 10 11 12 13 14 |  1 30 31 32 33 15 |  1 20 21 22 23  0",
        documents="      1  1  1  1  1  1 |  1  1  1  1  1  2 |  1  1  1  1  1 -1",
        begins="         1  1  1  1  1  1 |  1  1  1  1  1  0 |  1  1  1  1  1  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  5 |  0  1  2  3  4  5",
        document_start=" 0  0  0  0  0  0 |  0  0  0  0  0  5 |  0  0  0  0  0 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  4  5  0",
        causal_labels=" 10 11 12 13 14 15 | 30 31 32 33 15 16 | 20 21 22 23  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 30 31 32 33  . 16 | 20 21 22 23  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 0 0 0 5 | 0 0 0 0 0 0",
        cropped=1,
        cut=1,
    ),
    ByHand(
        packer="best_fit",
        bos="pinned",
        eos=False,
        positions_kind="document",
        tokens="         1 10 11 12 13 14 |  1 30 31 32 33 15 |  1 20 21 22 23  0",
        documents="      0  1  1  1  1  1 |  0  1  1  1  1  2 |  0  1  1  1  1 -1",
        begins="         0  1  1  1  1  1 |  0  1  1  1  1  0 |  0  1  1  1  1  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  1 |  0  1  2  3  4  0",
        document_start=" 0  1  1  1  1  1 |  0  1  1  1  1  5 |  0  1  1  1  1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  5  6 |  1  2  3  4  5  0",
        causal_labels=" 10 11 12 13 14 15 | 30 31 32 33 15 16 | 20 21 22 23  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 30 31 32 33  . 16 | 20 21 22 23  .  .",
        document_start_of_interval="0 1 1 1 1 1 | 0 1 1 1 1 5 | 0 1 1 1 1 0",
        cropped=1,
        cut=1,
    ),
    # The first document is cropped; its last position still predicts its next token.
    ByHand(
        packer="single",
        bos="none",
        eos=True,
        positions_kind="row",
        tokens="        10 11 12 13 14 15 | 20 21  2  0  0  0 | 30 31 32  2  0  0",
        documents="      1  1  1  1  1  1 |  1  1  1 -1 -1 -1 |  1  1  1  1 -1 -1",
        begins="         1  1  1  1  1  1 |  1  1  1  0  0  0 |  1  1  1  1  0  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  5 |  0  1  2  3  4  5",
        document_start=" 0  0  0  0  0  0 |  0  0  0 -1 -1 -1 |  0  0  0  0 -1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  0  0  0 |  1  2  3  4  0  0",
        causal_labels=" 11 12 13 14 15 16 | 21  2  .  .  .  . | 31 32  2  .  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="11 12 13 14 15 16 | 21  2  .  .  .  . | 31 32  2  .  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 0 0 0 0 | 0 0 0 0 0 0",
        cropped=2,
        cut=1,
    ),
    ByHand(
        packer="single",
        bos="document",
        eos=True,
        positions_kind="document",
        tokens="         1 10 11 12 13 14 |  1 20 21  2  0  0 |  1 30 31 32  2  0",
        documents="      1  1  1  1  1  1 |  1  1  1  1 -1 -1 |  1  1  1  1  1 -1",
        begins="         1  1  1  1  1  1 |  1  1  1  1  0  0 |  1  1  1  1  1  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  0  0 |  0  1  2  3  4  0",
        document_start=" 0  0  0  0  0  0 |  0  0  0  0 -1 -1 |  0  0  0  0  0 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  4  0  0 |  1  2  3  4  5  0",
        causal_labels=" 10 11 12 13 14 15 | 20 21  2  .  .  . | 30 31 32  2  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 20 21  2  .  .  . | 30 31 32  2  .  .",
        document_start_of_interval="0 0 0 0 0 0 | 0 0 0 0 0 0 | 0 0 0 0 0 0",
        cropped=3,
        cut=1,
    ),
    ByHand(
        packer="single",
        bos="pinned",
        eos=False,
        positions_kind="row",
        tokens="         1 10 11 12 13 14 |  1 20 21  0  0  0 |  1 30 31 32  0  0",
        documents="      0  1  1  1  1  1 |  0  1  1 -1 -1 -1 |  0  1  1  1 -1 -1",
        begins="         0  1  1  1  1  1 |  0  1  1  0  0  0 |  0  1  1  1  0  0",
        positions="      0  1  2  3  4  5 |  0  1  2  3  4  5 |  0  1  2  3  4  5",
        document_start=" 0  1  1  1  1  1 |  0  1  1 -1 -1 -1 |  0  1  1  1 -1 -1",
        stop="           1  2  3  4  5  6 |  1  2  3  0  0  0 |  1  2  3  4  0  0",
        causal_labels=" 10 11 12 13 14 15 | 20 21  .  .  .  . | 30 31 32  .  .  .",
        causal_start="   0  0  0  0  0  0 |  0  0  0  0  0  0 |  0  0  0  0  0  0",
        document_labels="10 11 12 13 14 15 | 20 21  .  .  .  . | 30 31 32  .  .  .",
        document_start_of_interval="0 1 1 1 1 1 | 0 1 1 0 0 0 | 0 1 1 1 0 0",
        cropped=2,
        cut=1,
    ),
]


def written(table: str) -> list[list[int]]:
    """The rows of a table in the notation above."""
    return [
        [IGNORE_LABEL if cell == "." else int(cell) for cell in row.split()]
        for row in table.split("|")
    ]


@pytest.mark.parametrize("mask", MaskKind)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.packer}-{case.bos}_bos")
def test_rows_are_as_written(case: ByHand, mask: MaskKind):
    text = [list(document) for document in TEXT[case.packer]]
    documents = Documents.end_to_end(
        np.concatenate(text).astype(np.uint16), np.cumsum([0, *map(len, text)]).astype(np.int64)
    )
    config = PackingConfig(
        packer=Packer(case.packer),
        mask=mask,
        bos=BosKind(case.bos),
        eos=case.eos,
        positions=PositionKind(case.positions_kind),
        context=6,
        batch_tokens=18,
    )
    plan = plan_in_order(documents.lengths_N, config)
    batch = finish_rows(gather_rows(documents, plan, config, SPECIALS), config, num_labels=0)

    causal = mask is MaskKind.causal
    labels = written(case.causal_labels if causal else case.document_labels)
    start = written(case.causal_start if causal else case.document_start_of_interval)
    assert batch.tokens_BT.tolist() == written(case.tokens)
    assert batch.labels_BT.tolist() == labels
    assert batch.positions_BT.tolist() == written(case.positions)
    assert batch.document_BT.tolist() == written(case.documents)
    assert batch.begins_BT.int().tolist() == written(case.begins)
    assert batch.mask.start_BT.tolist() == start
    assert batch.mask.stop_BT.tolist() == written(case.stop)
    assert batch.mask.document_start_BT.tolist() == written(case.document_start)
    assert batch.mask.pinned == int(case.bos == "pinned" and not causal)

    counted = plan.labels_R(config.labels).tolist()
    assert counted == [sum(label != IGNORE_LABEL for label in row) for row in labels]
    report = packing_report(plan, documents.lengths_N, config)
    assert (report.tokens_cropped, report.documents_cut) == (case.cropped, case.cut)
    assert report.tokens_padded == sum(row.count(-1) for row in written(case.documents))
    keys_BT = batch.mask.keys_per_query_BT()
    assert report.mean_keys == pytest.approx(float(keys_BT.sum() / (keys_BT > 0).sum()))


def test_every_packer_and_bos_is_written_out():
    assert {(case.packer, case.bos) for case in CASES} == {
        (packer.value, bos.value) for packer in Packer for bos in BosKind
    }
