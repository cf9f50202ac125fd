"""The benchmark without a GPU: what it times, when it refuses to, what it prints and writes.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D head dim.
"""

import itertools
import json
import sys
import time

import pytest
import torch

from kernels.attention import sink_attention
from kernels.bench import alternatives, contenders, measure
from kernels.bench.__main__ import command, main, parse, run
from kernels.bench.backends import _document_bounds, block_mask
from kernels.bench.cases import MASKS, Case, document_ids_BT, make_problem, select_cases
from kernels.bench.check import compare, relative_errors, truth_of
from kernels.bench.claims import CUDNN_TARGETS, claims
from kernels.bench.contender import LAYOUTS, Call, Forward, bound, repeat_groups
from kernels.bench.contenders import CONTENDERS, taking_part
from kernels.bench.table import summary, write_json
from kernels.bench.timing import interleaved
from kernels.errors import UserError

CPU = torch.device("cpu")
OURS = ["sinklab", "sinklab+stats", "sinklab+full"]


def small(mask="causal", groups=0, **changes) -> Case:
    settings = {"batch": 2, "heads": 4, "length": 128, "head_dim": 16, **changes}
    return Case(mask=mask, groups=groups, **settings)


class HostClock:
    """The wall clock, where no device works in the background."""

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, stop: float) -> float:
        return 1000 * (stop - start)


class FakeClock:
    """Time that passes only in the calls: the first call of each takes ten times as long."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def mark(self) -> float:
        return self.now

    def milliseconds(self, start: float, stop: float) -> float:
        return stop - start

    def call(self, name: str, milliseconds: float):
        def work():
            self.now += milliseconds * (1 if name in self.calls else 10)
            self.calls.append(name)

        return name, work


@pytest.fixture
def on_cpu(monkeypatch):
    """The reference in the place of the kernel, and one set of inputs, in CPU seconds."""
    monkeypatch.setattr(contenders, "IMPLEMENTATION", "reference")
    monkeypatch.setattr(measure, "num_sets", lambda problem: 1)


def timed(cases, names, **settings):
    environment = {"device": "cpu", "torch": torch.__version__}
    return run(
        cases, names, device=CPU, clock=HostClock(), environment=environment, rounds=2, **settings
    )


# What is timed


def test_documents_are_the_same_every_time_and_fill_their_rows():
    ids_BT = document_ids_BT(4, 2048)
    assert torch.equal(ids_BT, document_ids_BT(4, 2048))
    assert ids_BT.shape == (4, 2048) and ids_BT.dtype == torch.int32
    flat = ids_BT.flatten()
    steps = flat[1:] - flat[:-1]
    assert flat[0] == 1 and set(steps.tolist()) == {0, 1}
    # A document that a row's end cuts goes on in the next row, by a mask of its own.
    assert (ids_BT[1:, 0] == ids_BT[:-1, -1]).any()


def test_document_lengths_are_those_of_web_text():
    _, counts = torch.unique(document_ids_BT(64, 16384), return_counts=True)
    assert 350 < counts.median() < 450
    assert 700 < counts.double().mean() < 950
    assert counts.max() > 10_000


@pytest.mark.parametrize("mask", MASKS)
def test_arithmetic_is_what_the_mask_shows(mask):
    case = small(mask, groups=2, length=300)
    problem = make_problem(case, CPU)
    pairs = sum(row.sum().item() for row in problem.mask.dense_BTS())
    assert problem.pairs == pairs
    if mask == "causal":
        assert pairs == 2 * 300 * 301 // 2
    # Two products of two FLOPs a pair and feature, for each of four heads.
    assert problem.forward_flops == 2 * 2 * pairs * 4 * 16
    assert problem.total_flops == 3.5 * problem.forward_flops
    inputs = problem.inputs(0)
    sizes = [tensor.numel() * tensor.element_size() for tensor in inputs[:3]]
    assert problem.input_bytes == sum(sizes)


def test_inputs_are_seeded_and_have_a_sink():
    problem = make_problem(small(length=256), CPU)
    first, again, other = problem.inputs(0), problem.inputs(0), problem.inputs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.q_BTHD, other.q_BTHD)
    assert {tensor.dtype for tensor in first} == {torch.bfloat16}
    output = sink_attention(*first[:3], problem.mask, implementation="reference")
    assert output.statistics.first_mass_BHT[:, :, -1].mean() > 0.1


def test_the_record_begins_with_the_shapes_of_the_claims_and_has_every_length():
    cases = select_cases("record", [], None, 0, "bf16")
    assert [case.shape for case in cases[:4]] == [*CUDNN_TARGETS, (16, 12, 2048, 96)]
    grid = {(case.length, case.head_dim, case.mask) for case in cases}
    lengths = {512, 1024, 2048, 4096, 8192, 16384}
    assert grid == {(n, d, m) for n in lengths for d in (64, 96, 128) for m in MASKS}
    assert len(set(cases)) == len(cases)
    tokens = {(case.head_dim, case.batch * case.length) for case in cases}
    assert tokens == {(64, 65536), (96, 32768), (128, 32768)}


def test_a_shape_by_hand_takes_the_place_of_the_preset():
    cases = select_cases("quick", ["4,6,64,32"], None, 2, "fp16")
    assert [(case.shape, case.mask) for case in cases] == [((4, 6, 64, 32), m) for m in MASKS]
    assert {case.num_groups for case in cases} == {2} and cases[0].dtype == "fp16"
    assert cases[0].label == "4,6,64,32 G2 causal"


def test_backends_without_document_masks_stay_out_of_them():
    def names(mask, **changes):
        return {one.name for one in taking_part(small(mask, **changes), [])}

    assert names("causal") == set(CONTENDERS) - {"flash_varlen"}
    assert names("documents") == set(CONTENDERS) - {"cudnn", "flash"}
    assert names("causal", alternatives=False) == {*OURS, "cudnn", "flash", "flex"}
    named = taking_part(small(alternatives=False), ["second_pass", "sinklab"])
    assert [one.name for one in named] == ["sinklab", "second_pass"]


def test_document_bounds_for_flash():
    problem = make_problem(small("documents", length=1024), CPU)
    bounds, longest = _document_bounds(problem)
    assert bounds[0] == 0 and bounds[-1] == 2048 and 1024 in bounds
    assert bounds == sorted(set(bounds))
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert longest == max(lengths)
    # Each document shows a triangle.
    assert problem.pairs == sum(n * (n + 1) // 2 for n in lengths)


# Second pass: the mathematics behind the baselines


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
# FlexAttention warns that it runs uncompiled.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_second_passes_measure_the_statistics(mask, groups):
    problem = make_problem(small(mask, groups=groups), CPU)
    inputs = [tensor.float() for tensor in problem.inputs(0)[:3]]
    expected = sink_attention(*inputs, problem.mask, implementation="reference")
    q, k = inputs[0].transpose(1, 2), repeat_groups(inputs[1].transpose(1, 2), 4)
    starts = None if mask == "causal" else problem.mask.document_start_BT
    found = alternatives.named_masses(q, k, expected.lse_BHT, starts, problem.scale)
    key_major = block_mask(problem, key_major=True)
    found["key_mass_BHS"] = alternatives.key_mass_by_flex(
        q, k, expected.lse_BHT, key_major, problem.scale
    )
    if mask == "causal":
        halves = [
            alternatives.chunk_statistics(
                q[:, :, start : start + 64],
                k[:, :, : start + 64],
                expected.lse_BHT[:, :, start : start + 64],
                start,
                problem.scale,
            )
            for start in (0, 64)
        ]
        found["max_logit_BH"] = torch.stack([largest for _, largest in halves]).amax(0)
        by_chunks = halves[1][0]
        by_chunks[:, :, :64] += halves[0][0]
        torch.testing.assert_close(by_chunks, expected.statistics.key_mass_BHS)
    for name, value in found.items():
        torch.testing.assert_close(value, getattr(expected.statistics, name))


# Timing


def test_contenders_take_turns_and_the_first_call_is_not_counted():
    clock = FakeClock()
    calls = [clock.call("slow", 4.0), clock.call("fast", 1.0)]
    timings = interleaved(calls, clock=clock, rounds=5, burst_ms=8.0)
    assert timings["slow"] == (4.0, 0.0) and timings["fast"] == (1.0, 0.0)
    # A lead call and a burst of 8 ms each, in every round.
    rounds = clock.calls[8:]
    assert rounds.count("slow") == 5 * (1 + 2) and rounds.count("fast") == 5 * (1 + 8)
    changes = sum(a != b for a, b in itertools.pairwise(rounds))
    assert changes >= 5


def test_the_spread_is_between_the_quartiles():
    clock = FakeClock()
    durations = iter([1.0] * 4 + [d for d in (1.0, 2.0, 3.0, 4.0, 50.0) for _ in range(2)])

    def work():
        clock.now += next(durations)

    timing = interleaved([("only", work)], clock=clock, rounds=5, burst_ms=1.0)["only"]
    assert timing == (3.0, 2.0)


def test_small_inputs_are_rotated():
    assert measure.num_sets(make_problem(small(), CPU)) == measure.MAX_SETS
    problem = make_problem(Case(batch=2, heads=12, length=2048, head_dim=128), CPU)
    sets = measure.num_sets(problem)
    assert 1 < sets < measure.MAX_SETS and sets * problem.input_bytes >= measure.COLD_BYTES


def test_peak_by_card():
    assert measure.peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert measure.peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    # Slower cards of the same name must not be given the fast one's peak.
    assert measure.peak_tflops("NVIDIA H100 PCIe") is None


# The check


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_the_check_passes_what_is_right(on_cpu, mask, groups):
    problem = make_problem(small(mask, groups=groups), CPU)
    inputs = problem.inputs(0)
    truth = truth_of(problem, inputs)
    assert [(part.row, part.group) for part in truth] == [(0, 0), (1, (groups or 4) - 1)]
    runs = [(name, "BTHD") for name in OURS] + [("materialised", layout) for layout in LAYOUTS]
    for name, variant in runs:
        contender = CONTENDERS[name]
        bind = contender.prepare(problem, variant)
        verdict = compare(truth, bind(inputs).quantities(), contender.gives, 2.0)
        assert verdict.fault is None and verdict.ratio > 0
        assert (verdict.mean_mass_error is None) == (name == "sinklab")


def scaled(name, rows, factor):
    def change(quantities):
        quantities[name] = quantities[name].clone()
        quantities[name][rows] *= factor

    return change


WRONG = {
    "nan_anywhere": (scaled("out_BTHD", (0, 5, 2, 3), torch.nan), "out_BTHD holds NaN"),
    # Keys beside the sink, whose gradient is far larger: an error relative to the whole would pass.
    "dk_of_a_tile": (scaled("dk_BTGD", (0, slice(64, 96), 0), 0.0), "dk_BTGD: "),
    "dv_of_the_last_row": (scaled("dv_BTGD", (1, slice(64, 96), 3), 0.0), "dv_BTGD: "),
    "dq": (scaled("dq_BTHD", (0, slice(64, 96), 0), 0.0), "dq_BTHD: "),
    "out": (scaled("out_BTHD", (0, slice(64, 96), 0), 0.5), "out_BTHD: "),
    "lse": (scaled("lse_BHT", (0, 0), 1.1), "lse_BHT: "),
    "first_mass": (scaled("first_mass_BHT", (0, 0), 1.2), "first_mass_BHT: "),
    "document_mass": (scaled("document_mass_BHT", (1, 3), 1.2), "document_mass_BHT: "),
    "key_mass": (scaled("key_mass_BHS", (0, 0), 1.2), "key_mass_BHS: "),
    "max_logit": (scaled("max_logit_BH", (1, 3), 1.2), "max_logit_BH: "),
    "entropy": (scaled("entropy_BHT", (0, 0), 1.2), "entropy_BHT: "),
    "missing": (lambda quantities: quantities.pop("key_mass_BHS"), "key_mass_BHS is missing"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_turns_red(on_cpu, wrong):
    change, fault = WRONG[wrong]
    problem = make_problem(small(), CPU)
    inputs = problem.inputs(0)
    contender = CONTENDERS["sinklab+full"]
    quantities = contender.prepare(problem, "BTHD")(inputs).quantities()
    change(quantities)
    verdict = compare(truth_of(problem, inputs), quantities, contender.gives, 2.0)
    assert verdict.fault is not None and verdict.fault.startswith(fault)


def test_a_mean_mass_that_is_off_is_red_whatever_plain_pytorch_gives(on_cpu):
    problem = make_problem(small(), CPU)
    inputs = problem.inputs(0)
    contender = CONTENDERS["sinklab+stats"]
    quantities = contender.prepare(problem, "BTHD")(inputs).quantities()
    quantities["first_mass_BHT"] = quantities["first_mass_BHT"] + 2e-3
    verdict = compare(truth_of(problem, inputs), quantities, contender.gives, 1e9)
    assert verdict.fault == "a mean mass is off by 2.0e-03, at most 0.001 allowed"


def test_errors_are_relative_by_token():
    expected = torch.tensor([[[100.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    ours = expected.clone()
    ours[0, 1, 1] = 0.5
    # The second token's error over the median size, 2: a quarter.
    largest, mean = relative_errors("out_BTD", ours, expected)
    assert largest == pytest.approx(0.25) and mean == pytest.approx(0.25 / 3**0.5)


def test_the_gradient_lies_in_memory_as_out_does():
    """Else cuDNN and flash would be timed with a copy of the gradient."""
    problem = make_problem(small(), CPU)
    inputs = problem.inputs(0)

    def bind(inputs):
        leaf_BHTD = inputs.q_BTHD.transpose(1, 2).contiguous().requires_grad_()

        def forward():
            # Out in the order of tokens, whatever the order of q.
            return Forward((leaf_BHTD * 2).transpose(1, 2).contiguous().transpose(1, 2), {})

        grad_out = inputs.grad_out_BTHD.transpose(1, 2).contiguous()
        return Call(forward, (leaf_BHTD,), grad_out, lambda x: x.transpose(1, 2))

    call = bound(bind, inputs)
    assert call.grad_out.stride() == call.forward().out.stride()
    assert call.grad_out.stride() != bind(inputs).grad_out.stride()
    assert torch.equal(call.grad_out, inputs.grad_out_BTHD.transpose(1, 2))


# A whole run


def test_a_run_prints_and_writes_what_it_measured(on_cpu, tmp_path, capsys):
    path = tmp_path / "bench" / "out.json"
    names = ["sinklab", "sinklab+stats", "materialised", "flash_varlen"]
    assert timed([small(), small("documents")], names, json_path=path) == 0
    environment, *records = json.loads(path.read_text())
    assert environment["environment"]["device"] == "cpu"
    # Flash has no kernel for a CPU: the run goes on without it and says why.
    (note,) = environment["environment"]["notes"]
    assert note["implementation"] == "flash_varlen" and "CPU" in note["note"]
    assert [(record["mask"], record["implementation"]) for record in records] == [
        (mask, name) for mask in MASKS for name in names[:3]
    ]
    for record in records:
        assert record["shape"] == [2, 4, 128, 16] and record["dtype"] == "bf16"
        for field in ("forward_ms", "backward_ms", "total_ms", "tflops"):
            assert record[field] >= 0
        assert set(record["spread_ms"]) == {"forward", "backward", "total"}
        assert record["timed_by"] == "events"
        assert record["peak_mib"] is None and record["share_of_peak"] is None
    printed = capsys.readouterr().out
    assert "2,4,128,16 documents" in printed and "claims" in printed


def test_red_means_no_numbers_and_exit_code_1(on_cpu, monkeypatch, tmp_path, capsys):
    def half(*arguments, **settings):
        output = sink_attention(*arguments, **settings)
        return output._replace(out_BTHE=output.out_BTHE * 0.5)

    monkeypatch.setattr(contenders, "sink_attention", half)
    path = tmp_path / "out.json"
    assert timed([small()], ["sinklab", "materialised"], json_path=path) == 1
    printed = capsys.readouterr().out
    assert "RED 2,4,128,16 causal sinklab: the check is red: " in printed
    assert "forward" not in printed
    (environment,) = json.loads(path.read_text())
    assert len(environment["environment"]["red"]) == 1


def test_a_crash_of_ours_is_red_and_the_run_goes_on(on_cpu, monkeypatch, capsys):
    def crash(*arguments, **settings):
        if arguments[0].shape[1] == 128:
            raise RuntimeError("illegal memory access\nand more")
        return sink_attention(*arguments, **settings)

    monkeypatch.setattr(contenders, "sink_attention", crash)
    assert timed([small(), small(length=64)], ["sinklab"]) == 1
    captured = capsys.readouterr()
    assert "RED 2,4,128,16 causal sinklab: RuntimeError: illegal memory access\n" in captured.out
    assert "Traceback" in captured.err
    assert "2,4,64,16 causal" in captured.out


def test_the_budget_leaves_the_rest_and_says_so(on_cpu, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert timed([small(), small("documents")], ["sinklab"], json_path=path, budget=-1) == 0
    printed = capsys.readouterr().out
    assert "budget spent, not started: 2 (2,4,128,16 causal; 2,4,128,16 documents)" in printed
    (environment,) = json.loads(path.read_text())
    assert len(environment["environment"]["not_started"]) == 2


def test_a_layout_that_fails_leaves_the_other(on_cpu, monkeypatch):
    """Backends refuse some layouts; the one they take must still be timed."""
    contender = CONTENDERS["materialised"]
    prepared = []

    def prepare(problem, variant):
        prepared.append(variant)
        if variant == "first":
            raise RuntimeError("not this layout")
        return contender.prepare(problem, "BHTD")

    choosy = measure.Contender(
        name="choosy", variants=lambda case: ("first", "second"), prepare=prepare
    )
    choices = {}
    for _ in range(2):
        result = measure.measure_case(
            small(), [choosy], device=CPU, clock=HostClock(), choices=choices, rounds=2
        )
        assert [record["variant"] for record in result.records] == ["second"]
    assert choices == {("choosy", "causal", 16): "second"}
    # Measured once, then kept.
    assert prepared == ["first", "second", "second"]


# What it prints


def record(shape, implementation, total, mask="causal", **changes):
    return {
        "shape": list(shape),
        "groups": shape[1],
        "mask": mask,
        "dtype": "bf16",
        "implementation": implementation,
        "variant": "BTHD",
        "forward_ms": total / 4,
        "backward_ms": total * 3 / 4,
        "total_ms": total,
        "spread_ms": {"forward": 0.01, "backward": 0.01, "total": 0.01},
        "peak_mib": 500.0,
        "tflops": 400.0,
        "share_of_peak": 0.4,
        "timed_by": "cuda_graph",
        "mean_mass_error": 1e-5,
        **changes,
    }


MAIN, LONG, WIDE = CUDNN_TARGETS


def test_claims_from_records():
    long_row = (4, 12, 16384, 64)
    records = [
        record(MAIN, "sinklab", 1.96),
        record(MAIN, "sinklab+stats", 2.0),
        record(MAIN, "sinklab+full", 2.04),
        record(MAIN, "cudnn", 2.0),
        record(MAIN, "flash", 3.0),
        record(MAIN, "flex", 2.6),
        record(LONG, "sinklab", 10.0),
        record(LONG, "sinklab+stats", 10.5, mean_mass_error=2e-3),
        record(LONG, "cudnn", 10.0),
        record(LONG, "flex", 11.0),
        record(WIDE, "sinklab+stats", 2.2),
        record(WIDE, "cudnn", 1.8),
        record((16, 12, 2048, 96), "sinklab+stats", 1.65),
        record(MAIN, "sinklab+stats", 1.0, "documents"),
        record(MAIN, "flex", 1.5, "documents"),
        record(long_row, "sinklab+stats", 20.0, peak_mib=510.0),
        record(long_row, "flash", 40.0),
    ]
    found = [(c.what, round(c.measured, 4), c.status) for c in claims(records) if c.measured]
    assert found == [
        ("basic / cudnn", 1.0, "met"),
        ("basic / cudnn", 1.05, "floor"),
        ("basic / cudnn", round(2.2 / 1.8, 4), "MISSED"),
        ("flex / basic, causal, D < 128", round(11 / 10.5, 4), "MISSED"),
        ("flash / basic, causal", 1.5, "met"),
        ("flex / basic, documents", 1.5, "met"),
        ("basic / off, median", round((2 / 1.96 + 1.05) / 2, 4), "MISSED"),
        ("basic / off, worst", 1.05, "MISSED"),
        ("full / off, worst", round(2.04 / 1.96, 4), "met"),
        ("time per FLOP, D 96 / D 128", 1.0, "met"),
        ("largest error of a mean mass", 0.002, "MISSED"),
        ("peak memory at 16k, basic / flash", 1.02, "met"),
    ]
    unmeasured = [c.what for c in claims(records) if c.status == "not measured"]
    assert unmeasured == ["flex / basic, causal, D >= 128"]
    weakest = next(c for c in claims(records) if c.what == "flex / basic, causal, D < 128")
    assert weakest.where == "8,12,8192,64 causal"


def test_grouped_heads_make_no_claim():
    grouped = [record(MAIN, name, 2.0, groups=4) for name in ("sinklab+stats", "cudnn", "flex")]
    statuses = {claim.what: claim.status for claim in claims(grouped)}
    assert statuses["basic / cudnn"] == statuses["flex / basic, causal, D < 128"] == "not measured"


def test_the_summary_of_a_record_fits_what_a_device_call_returns():
    cases = select_cases("record", [], None, 0, "bf16")
    records = [
        record(case.shape, contender.name, 123.456, case.mask)
        for case in cases
        for contender in taking_part(case, [])
    ]
    text = summary(records)
    assert len(text) < 12_000
    for case in cases:
        assert text.count(case.label) >= 2
    lines = text.splitlines()
    assert lines[1].split() == [
        *("off", "basic", "full", "cudnn", "flash", "flex", "varlen", "written", "2nd", "pass"),
    ]


def test_ratios_of_one_shape():
    text = summary([record(MAIN, "sinklab+stats", 2.0), record(MAIN, "cudnn", 1.6)])
    (row,) = [line for line in text.splitlines() if "1.250" in line and "claims" not in line][:1]
    assert row.split()[:3] == ["32,12,2048,64", "causal", "1.250"]
    assert "MISSED" in text


def test_a_summary_of_nothing():
    assert "not measured" in summary([])


def test_json_is_a_list_with_the_environment_first(tmp_path):
    path = tmp_path / "new" / "bench.json"
    rows = [record(MAIN, "cudnn", 2.0)]
    write_json(path, {"device": "card"}, rows)
    assert json.loads(path.read_text()) == [{"environment": {"device": "card"}}, *rows]
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


# Mistakes


MISTAKES = {
    "shape_words": (["--shape", "8,x,64"], "--shape must be B,H,T,D, four whole numbers, got"),
    "shape_three": (["--shape", "8,12,64"], "--shape must be B,H,T,D, four whole numbers, got"),
    "shape_zero": (["--shape", "0,12,64,64"], "--shape batch must be >= 1, got 0"),
    "shape_long": (["--shape", "1,1,32768,64"], "--shape length must be 16 to 16384, got 32768"),
    "head_dim": (["--shape", "1,1,64,20"], "--shape head dim must be a multiple of 8 from 16 to"),
    "groups": (["--groups", "5"], "--groups must be >= 1 and divide the 12 heads, got 5"),
    "mask": (["--mask", "window"], "argument --mask: invalid choice: 'window'"),
    "only": (["--only", "cudnn,cuddn"], "--only must be some of sinklab, sinklab+stats"),
    "rounds": (["--rounds", "1"], "--rounds must be >= 2, got 1"),
    "two_ways": (["--preset", "quick", "--shape", "1,1,64,64"], "--shape can't be combined with"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(mistake, monkeypatch, capsys):
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["kernels.bench", *arguments])
    assert command() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be a CUDA GPU, got none"):
        main(["--preset", "quick"])


def test_a_profile_is_of_one_case():
    options = parse(["--profile", "4,2,64,32", "--groups", "1"])
    assert [case.label for case in options.cases] == ["4,2,64,32 G1 causal"]
    options = parse(["--profile", "4,2,64,32", "--mask", "documents"])
    assert [case.mask for case in options.cases] == ["documents"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_shape_on_a_gpu(tmp_path, capsys):
    """Everything but what compiles for minutes: captured, measured, and no note of a failure."""
    path = tmp_path / "out.json"
    names = [*OURS, "cudnn", "flash", "flash_varlen", "materialised"]
    chosen = ["--shape", "2,2,256,64", "--only", ",".join(names)]
    assert main([*chosen, "--rounds", "2", "--json", str(path)]) == 0
    environment, *records = json.loads(path.read_text())
    assert environment["environment"]["notes"] == []
    assert {(record["mask"], record["implementation"]) for record in records} == {
        (case.mask, contender.name)
        for case in select_cases("quick", ["2,2,256,64"], None, 0, "bf16")
        for contender in taking_part(case, names)
    }
    for record in records:
        by_graph = record["implementation"] != "materialised"
        assert record["timed_by"] == ("cuda_graph" if by_graph else "events")
        assert record["peak_mib"] > 0 and record["total_ms"] > 0
    assert main(["--profile", "2,2,256,64"]) == 0
    assert "us a forward and backward" in capsys.readouterr().out
