"""How the benchmark measures, and its gate: timing, the check, whole runs on a CPU.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D head dim.
"""

import itertools
import json
import time

import pytest
import torch

from kernels.attention import sink_attention
from kernels.bench import contenders, measure
from kernels.bench.__main__ import run
from kernels.bench.cases import MASKS, Case, make_problem
from kernels.bench.check import compare, relative_errors, truth_of
from kernels.bench.contender import LAYOUTS, Call, Forward, bound
from kernels.bench.contenders import CONTENDERS
from kernels.bench.timing import interleaved
from tests.kernels.benched import CPU, OURS, small


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
