"""Sink sums against values worked out by hand."""

import math

import pandas as pd
import pytest
import torch

from kernels.attention import Statistics, sink_attention
from kernels.masks import IntervalMask
from train.metrics import (
    THRESHOLDS,
    SinkSums,
    SinkTotals,
    document_sums,
    first_key_sums,
    layer_sums,
    long_document_starts,
    null_slot_sums,
    position_sums,
)
from train.sink_table import sink_metrics, sink_table

EPS_03 = THRESHOLDS.index(0.3)


def documents(*lengths: int, cut_first: bool = False, pinned: bool = False):
    """document_BT and begins_BT of one row, and its mask's arguments."""
    ids = [0] if pinned else []
    for number, length in enumerate(lengths, start=1):
        ids += [number] * length
    document_BT = torch.tensor([ids], dtype=torch.int32)
    begins_BT = ~((document_BT == 1) & cut_first)
    return document_BT, begins_BT


def uniform_mass(mask: IntervalMask, key_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T]: what a head that attends uniformly pays to the key."""
    return (mask.sees_BT(key_BT) / mask.keys_per_query_BT())[:, None]


def test_a_uniform_head_has_the_harmonic_baseline_and_no_excess():
    mask = IntervalMask.causal(2, 100)
    sums = first_key_sums(uniform_mass(mask, torch.zeros(2, 100)), mask)
    harmonic = sum(1 / n for n in range(1, 65)) / 64
    assert sums.count.tolist() == [2]
    assert (sums.alpha / sums.count).item() == pytest.approx(harmonic)
    assert (sums.baseline / sums.count).item() == pytest.approx(harmonic)
    assert harmonic == pytest.approx(0.074, abs=5e-4)


def test_the_horizon_reads_the_first_64_queries_and_the_row_all_of_them():
    mask = IntervalMask.causal(1, 128)
    mass_BHT = torch.zeros(1, 2, 128)
    mass_BHT[0, 0, :64] = 1.0
    mass_BHT[0, 1, 64:] = 1.0
    assert first_key_sums(mass_BHT, mask).alpha.tolist() == [1.0, 0.0]
    assert first_key_sums(mass_BHT, mask, whole_row=True).alpha.tolist() == [0.5, 0.5]


def test_each_sample_is_thresholded_before_the_average():
    mask = IntervalMask.causal(2, 64)
    mass_BHT = torch.zeros(2, 1, 64)
    mass_BHT[0] = 0.5
    sums = first_key_sums(mass_BHT, mask)
    assert sums.over[0, EPS_03].item() == 1
    assert (sums.alpha / sums.count).item() == pytest.approx(0.25)


def test_a_first_key_that_fewer_than_64_queries_see_does_not_count():
    document_BT, _ = documents(63, 65)
    mask = IntervalMask.from_documents(document_BT)
    mass_BHT = torch.ones(1, 1, 128)
    assert first_key_sums(mass_BHT, mask).count.item() == 0
    assert first_key_sums(mass_BHT, mask, whole_row=True).count.item() == 0
    whole = IntervalMask.from_documents(document_BT, causal_across=True)
    assert first_key_sums(mass_BHT, whole).count.item() == 1


def test_a_pinned_bos_counts_whatever_the_documents():
    document_BT, _ = documents(5, 122, pinned=True)
    mask = IntervalMask.from_documents(document_BT, pinned=1)
    sums = first_key_sums(uniform_mass(mask, torch.zeros(1, 128)), mask)
    shares = [1.0] + [1 / (n + 1) for n in range(1, 6)] + [1 / (n + 1) for n in range(1, 59)]
    assert (sums.alpha / sums.count).item() == pytest.approx(sum(shares) / 64)
    assert (sums.baseline / sums.count).item() == pytest.approx(sum(shares) / 64)


def test_rows_shorter_than_the_horizon_have_no_samples():
    assert first_key_sums(torch.ones(1, 1, 63), IntervalMask.causal(1, 63)) is None


@pytest.mark.parametrize(
    ("lengths", "cut_first", "starts"),
    [
        ((64, 64), False, [0, 64]),
        ((63, 65), False, [63]),
        ((64, 64), True, [64]),
        ((100, 10, 70, 20), False, [0, 110]),
        ((1, 1, 1, 125), False, [3]),
        ((65, 63), False, [0]),
    ],
    ids=str,
)
def test_long_documents_that_begin_in_the_row_are_found(lengths, cut_first, starts):
    document_BT, begins_BT = documents(*lengths, cut_first=cut_first)
    mask = IntervalMask.from_documents(document_BT)
    start_BK, exists_BK = long_document_starts(begins_BT, mask.document_start_BT)
    assert start_BK[exists_BK].tolist() == starts


def test_document_starts_are_samples_of_their_own():
    document_BT, begins_BT = documents(70, 10, 80)
    mask = IntervalMask.from_documents(document_BT)
    mass_BHT = torch.zeros(1, 1, 160)
    mass_BHT[0, 0, 80:144] = 0.4
    mass_BHT[0, 0, 144:] = 1.0
    sums = document_sums(mass_BHT, mask, begins_BT)
    assert sums.count.tolist() == [2]
    assert sums.alpha.item() == pytest.approx(0.4)
    assert sums.over[0, EPS_03].item() == 1


def test_a_window_that_hides_the_start_takes_the_document_out():
    document_BT, begins_BT = documents(128)
    mask = IntervalMask.from_documents(document_BT).window(63)
    assert document_sums(torch.ones(1, 1, 128), mask, begins_BT).count.item() == 0
    assert first_key_sums(torch.ones(1, 1, 128), mask).count.item() == 0


def test_null_slot_mass_has_a_baseline_that_counts_the_slot():
    mask = IntervalMask.causal(1, 64)
    sums = null_slot_sums(torch.full((1, 3, 64), 0.25), mask)
    assert sums.alpha.tolist() == [0.25] * 3
    expected = sum(1 / (n + 1) for n in range(1, 65)) / 64
    assert sums.baseline[0].item() == pytest.approx(expected)


def uniform_with_slot(slot_logit: float) -> Statistics:
    """Two rows of 130 queries, whose 3 heads attend uniformly to keys and to a slot."""
    q_BTHD = torch.zeros(2, 130, 3, 8)
    null_logit_H = torch.full((3,), slot_logit)
    mask = IntervalMask.causal(2, 130)
    return sink_attention(q_BTHD, q_BTHD, q_BTHD, mask, null_logit=null_logit_H).statistics


def sums_of(statistics: Statistics, num_tokens: int = 130):
    begins_BT = torch.ones(2, num_tokens, dtype=torch.bool)
    mask = IntervalMask.causal(2, num_tokens)
    return layer_sums(statistics, mask, begins_BT, positions=4)


def test_a_slot_is_one_of_the_keys_of_a_uniform_head():
    for kind, sums in sums_of(uniform_with_slot(0.0)).items():
        assert sums.count.sum() > 0
        torch.testing.assert_close(sums.alpha, sums.baseline, msg=kind)


@pytest.mark.parametrize("slot_logit", [0.0, 3.0, 6.0, 10.0, 14.0, 17.0, 25.0])
def test_the_first_key_of_the_keys_has_no_rounding_for_a_value(slot_logit):
    """Beside a slot that takes all but nothing the keys' share is what is left of their sum."""
    sums = sums_of(uniform_with_slot(slot_logit))["first_of_keys"]
    left = 1 - sums_of(uniform_with_slot(slot_logit))["null"].alpha[0].item() / 2
    assert sums.count.tolist() == [2.0 if left > 2e-3 else 0.0] * 3 or 5e-4 < left < 2e-3
    if sums.count[0]:
        share = sums.alpha[0].item() / sums.count[0].item()
        assert 0.03 < share < 0.08


def test_layers_that_never_see_the_first_key_leave_the_others_their_figures():
    part = first_key_sums(torch.full((2, 2, 64), 0.5), IntervalMask.causal(2, 64))
    hidden = first_key_sums(torch.zeros(2, 2, 64), IntervalMask.causal(2, 64).window(32))
    both = {name: torch.stack([value, vars(part)[name]]) for name, value in vars(hidden).items()}
    metrics = sink_metrics(SinkTotals(2, {"first": SinkSums(**both)}))
    assert metrics["sink/mass"] == metrics["sink/mass/layer_01"] == 0.5
    assert metrics["sink/rate_030"] == metrics["sink/rate_030_of_means"] == 1.0
    assert "sink/mass/layer_00" not in metrics


@pytest.mark.parametrize("window", [None, 70], ids=["causal", "window70"])
def test_positions_of_uniform_attention_equal_their_baseline(window):
    torch.manual_seed(0)
    mask = IntervalMask.causal(2, 130)
    mask = mask if window is None else mask.window(window)
    q_BTHD = torch.zeros(2, 130, 3, 8)
    key_mass_BHS = sink_attention(q_BTHD, q_BTHD, q_BTHD, mask).statistics.key_mass_BHS
    sums = position_sums(key_mass_BHS, mask, positions=16)
    assert sums.count.tolist() == [[2.0] * 16] * 3
    torch.testing.assert_close(sums.alpha, sums.baseline)
    assert sums.alpha[0, 0] > sums.alpha[0, 5] > 0


def test_metrics_and_table_name_the_three_aggregations():
    mask = IntervalMask.causal(2, 64)
    mass_BHT = torch.zeros(2, 2, 64)
    mass_BHT[0, 0] = 0.9
    mass_BHT[:, 1] = 0.35
    part = first_key_sums(mass_BHT, mask)
    totals = SinkTotals(1, {"first": part.map(lambda v: v[None])})
    metrics = sink_metrics(totals)
    assert metrics["sink/mass"] == pytest.approx((0.45 + 0.35) / 2)
    assert metrics["sink/rate_030"] == pytest.approx(3 / 4)
    assert metrics["sink/rate_030_of_means"] == 1.0
    assert metrics["sink/rate_080"] == pytest.approx(1 / 4)
    assert metrics["sink/rate_080_of_means"] == 0.0
    assert metrics["sink/mass/layer_00"] == metrics["sink/mass"]
    assert not any("from_layer" in name for name in metrics)
    table = sink_table(totals, "probability")
    assert isinstance(table, pd.DataFrame)
    assert table["over_030"].tolist() == [1, 2]
    assert set(table["alpha_kind"]) == {"probability"}
    assert math.isclose(table["alpha"][0], 0.45, rel_tol=1e-6)


def test_sums_compile_without_a_graph_break():
    """For a causal mask and one of documents, each with its own program."""
    document_BT, begins_BT = documents(70, 10, 80)
    compiled = torch.compile(layer_sums, fullgraph=True, backend="eager", dynamic=False)
    for mask in (IntervalMask.causal(1, 160), IntervalMask.from_documents(document_BT)):
        q_BTHD = torch.randn(1, 160, 3, 8)
        statistics = sink_attention(q_BTHD, q_BTHD, q_BTHD, mask).statistics
        wanted = layer_sums(statistics, mask, begins_BT, 4)
        found = compiled(statistics, mask, begins_BT, 4)
        assert list(found) == list(wanted) == ["first", "first_row", "document", "position"]
        for kind, sums in wanted.items():
            for name, value in vars(sums).items():
                torch.testing.assert_close(vars(found[kind])[name], value)


def test_totals_over_ranks_keep_dtypes_and_are_no_part_of_what_goes_on():
    """Sums of fp64 statistics have fp32 baselines; a run that is resumed must sum as before."""
    document_BT, begins_BT = documents(70, 90)
    mask = IntervalMask.from_documents(document_BT)
    q_BTHD = torch.randn(1, 160, 3, 8, dtype=torch.float64)
    totals = SinkTotals(1)
    for _ in range(2):
        totals.add([sink_attention(q_BTHD, q_BTHD, q_BTHD, mask).statistics], [mask], begins_BT, 4)
    reduced = totals.reduce(lambda value: 2 * value)
    assert reduced.sums["first"].alpha.dtype == torch.float64
    for kind, sums in totals.sums.items():
        for name, value in vars(sums).items():
            found = vars(reduced.sums[kind])[name]
            torch.testing.assert_close(found, 2 * value, rtol=0, atol=0)
            before = value.clone()
            found.fill_(-1)
            assert torch.equal(value, before)
    assert SinkTotals(1).reduce(lambda value: 1 / 0).sums == {}
