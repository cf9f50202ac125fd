"""Sinks of documents' own: decoders whose attention is known, rows laid out by hand."""

import pytest
import torch

from kernels.masks import IntervalMask
from models.batch import IGNORE_LABEL, PackedBatch
from tests.train.handmade import blank_decoder, planted_sink, values
from train.metrics import HORIZON
from train.probes.base import ProbeInputs
from train.probes.documents import INNER, LONG, long_starts, probe_documents


def row_of(*lengths: int, begins: bool = True, masked: bool = True) -> PackedBatch:
    """Documents of these lengths in a row; the first begins there or not."""
    document_T = torch.repeat_interleave(
        torch.arange(1, len(lengths) + 1, dtype=torch.int32), torch.tensor(lengths)
    )
    starts = torch.tensor([0, *lengths]).cumsum(0)
    num_tokens = len(document_T)
    begins_BT = torch.ones(1, num_tokens, dtype=torch.bool)
    begins_BT[0, : lengths[0]] = begins
    start_T = starts[document_T.long() - 1]
    mask = IntervalMask(
        start_BT=(start_T if masked else torch.zeros_like(start_T))[None].int(),
        stop_BT=torch.arange(1, num_tokens + 1)[None].int(),
        document_start_BT=start_T[None].int(),
    )
    return PackedBatch(
        tokens_BT=torch.arange(num_tokens)[None] % 16,
        labels_BT=torch.full((1, num_tokens), IGNORE_LABEL),
        positions_BT=torch.arange(num_tokens)[None],
        document_BT=document_T[None],
        begins_BT=begins_BT,
        mask=mask,
        num_labels=torch.tensor(0),
    )


def found(decoder, *rows: PackedBatch) -> dict[str, float]:
    inputs = ProbeInputs(
        prompts={},
        context=list(rows),
        token_class_V=torch.zeros(16, dtype=torch.int64),
        trained_with_bos=False,
    )
    findings = list(probe_documents(decoder, inputs))
    assert all(f.layer == f.head == f.position == -1 for f in findings)
    return {finding.name: values(findings, finding.name)[0] for finding in findings}


def test_the_documents_that_count_begin_in_the_row_and_are_long():
    assert LONG == 127 and INNER[0] == 8
    assert long_starts(row_of(30, 127, 126, 140), 0) == [30, 283]
    assert long_starts(row_of(127, 127, begins=False), 0) == [127]
    assert long_starts(row_of(126), 0) == []


@pytest.mark.parametrize("masked", [True, False])
def test_uniform_attention_has_no_excess(masked):
    told = found(blank_decoder(), row_of(20, 130, masked=masked))
    assert told["samples"] == 1
    before = 0 if masked else 20
    shares = [1 / (before + i + 1) for i in range(LONG)]
    alpha = [sum(shares[o : o + HORIZON]) / HORIZON for o in (0, *INNER)]
    assert told["start_mass"] == pytest.approx(alpha[0])
    assert told["inner_mass"] == pytest.approx(sum(alpha[1:]) / len(INNER))
    assert told["start_excess"] == pytest.approx(0, abs=1e-9)
    assert told["inner_excess"] == pytest.approx(0, abs=1e-9)
    assert told["start_rate_030"] == told["inner_rate_030"] == 0


def test_a_sink_at_document_starts_is_found():
    """Two of three layers look at what saw itself alone."""
    told = found(planted_sink(), row_of(20, 130, 128))
    assert told["samples"] == 2
    assert told["start_rate_080"] == pytest.approx(2 / 3)
    assert told["inner_rate_020"] == 0
    assert told["start_excess"] > 0.5 > 0 > told["inner_excess"]


def test_without_a_long_document_only_their_number_is_told():
    assert found(blank_decoder(), row_of(60, 60)) == {"samples": 0}
