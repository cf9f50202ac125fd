"""One case from inputs to figures: check every contender, then time all of them side by side.

Three times are taken, each on its own: forward (as in training, keeping what the backward pass
needs), backward, and both together, which is what claims are about. Calls are captured in CUDA
graphs where that works, so that no launch by Python is in a figure. Inputs of less than
``COLD_BYTES`` are rotated, so that no call finds its own in the cache.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config

from kernels.bench.cases import Case, Inputs, Problem, make_problem
from kernels.bench.check import (
    OUR_FACTOR,
    THEIR_FACTOR,
    Part,
    Verdict,
    compare,
    poison_free_memory,
    truth_of,
)
from kernels.bench.contender import Bind, Call, Contender, Skipped, bound
from kernels.bench.contenders import OURS
from kernels.bench.timing import Captured, Clock, Timing, interleaved
from kernels.errors import UserError

COLD_BYTES = 100 * 10**6
"""q, k and v of all sets together are at least this large: twice an H100's L2 cache."""

MAX_SETS = 64
"""Sets of inputs, at most; shapes of less than 1.6 MB stay in the cache whatever we do."""

MEASURES = ("total", "forward", "backward")

PEAK_TFLOPS = {"H100 80GB HBM3": 989.4, "H200": 989.4, "A100": 312.0}
"""Dense bf16 and fp16 peak by a part of the device's name; other cards get no share of peak."""


@dataclass
class CaseResult:
    """What became of a case.

    records: an object for the JSON each. notes: (contender, why it has no figures, or none by CUDA
    graph). red: what the check found wrong with ours, in a line; there are no records then.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    red: str | None = None


@dataclass
class _Ready:
    """A contender that passed the check, bound to every set of inputs."""

    contender: Contender
    variant: str
    calls: list[Call]
    verdict: Verdict
    peak_mib: float | None
    timed_by: dict[str, str] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)


def measure_case(
    case: Case,
    contenders: Sequence[Contender],
    *,
    device: torch.device,
    clock: Clock,
    choices: dict[tuple[str, str, int], str],
    rounds: int = 20,
) -> CaseResult:
    """Check and time one case.

    choices: the variant found fastest by (contender, mask, head dim), found once and kept.
    """
    compile_as_timed()
    result = CaseResult()
    problem = make_problem(case, device)
    sets = [problem.inputs(index) for index in range(num_sets(problem))]
    truth = truth_of(problem, sets[0])
    ready: list[_Ready] = []
    for contender in contenders:
        is_ours = contender in OURS
        try:
            variant, bind = _fastest_variant(problem, contender, sets[0], clock, choices)
            ready.append(checked(contender, variant, bind, sets, truth))
            continue
        except UserError:
            raise
        except Skipped as skipped:
            reason = str(skipped)
        except Exception as error:
            if is_ours:
                traceback.print_exc()
            reason = _in_one_line(error)
        if is_ours:
            result.red = f"{contender.name}: {reason}"
            return result
        result.notes.append((contender.name, reason))
    _time(ready, device, clock, rounds, result)
    result.records = [_record(problem, one) for one in ready]
    return result


def compile_as_timed() -> None:
    """Settings of torch.compile for the next case."""
    # Compiled code of earlier shapes would count against PyTorch's limit of recompilations.
    torch.compiler.reset()
    # Else compiled code may overwrite what it saved, and can't go backward twice.
    torch._functorch.config.donated_buffer = False


def num_sets(problem: Problem) -> int:
    """Sets of inputs that a call goes through."""
    return min(MAX_SETS, -(-COLD_BYTES // problem.input_bytes))


def peak_tflops(device_name: str) -> float | None:
    """Dense half-precision peak of a card, in TFLOP/s; None if the name isn't in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def checked(
    contender: Contender,
    variant: str,
    bind: Bind,
    sets: list[Inputs],
    truth: list[Part],
) -> _Ready:
    """A contender that gives what it should; ``Skipped`` if not."""
    factor = OUR_FACTOR if contender in OURS else THEIR_FACTOR
    calls = [bound(bind, inputs) for inputs in sets]
    device = sets[0].q_BTHD.device
    poison_free_memory(device)
    verdict = compare(truth, calls[0].quantities(), contender.gives, factor)
    if verdict.fault:
        raise Skipped(f"the check is red: {verdict.fault}")
    return _Ready(contender, variant, calls, verdict, _peak_mib(calls[0], device))


def _fastest_variant(
    problem: Problem,
    contender: Contender,
    inputs: Inputs,
    clock: Clock,
    choices: dict[tuple[str, str, int], str],
) -> tuple[str, Bind]:
    """A contender in the variant that is fastest forward and backward together."""
    case = problem.case
    key = (contender.name, case.mask, case.head_dim)
    variants = contender.variants(case)
    if key not in choices and len(variants) == 1:
        choices[key] = variants[0]
    if key in choices:
        return choices[key], contender.prepare(problem, choices[key])
    binds, failed = {}, Skipped("it has no variant")
    for variant in variants:
        try:
            binds[variant] = contender.prepare(problem, variant)
            bound(binds[variant], inputs).both()
        except Exception as error:
            # One layout may be refused where the other runs.
            binds.pop(variant, None)
            failed = error
    if not binds:
        raise failed
    calls = [(variant, bound(bind, inputs).both) for variant, bind in binds.items()]
    timings = interleaved(calls, clock=clock, rounds=3)
    choices[key] = min(timings, key=lambda variant: timings[variant].median)
    return choices[key], binds[choices[key]]


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """Most memory that a forward and backward pass needs beside its inputs; CUDA only."""
    if device.type != "cuda":
        return None
    call.both()
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward = call.forward()
    gradients = call.backward(forward.out)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    # Outputs and gradients are held up to here: a training step has them all at this point.
    del forward, gradients
    return (peak - before) / 2**20


def _work(calls: list[Call], measure: str) -> Callable[[], None]:
    """A function that goes once through all sets of inputs."""

    def total() -> None:
        for call in calls:
            call.both()

    def forward() -> None:
        for call in calls:
            call.forward()

    if measure != "backward":
        return total if measure == "total" else forward
    outs = [call.forward().out for call in calls]

    def backward() -> None:
        for call, out in zip(calls, outs, strict=True):
            call.backward(out, again=True)

    return backward


def _time(
    ready: list[_Ready], device: torch.device, clock: Clock, rounds: int, result: CaseResult
) -> None:
    """Fill in every contender's times, one measure after the other."""
    for measure in MEASURES:
        # A function of its own: captured graphs hold their memory until nothing names them.
        timings = _time_one(ready, measure, device, clock, rounds, result)
        for one in ready:
            per_call = (value / len(one.calls) for value in timings[one.contender.name])
            one.times[measure] = Timing(*per_call)


def _time_one(
    ready: list[_Ready],
    measure: str,
    device: torch.device,
    clock: Clock,
    rounds: int,
    result: CaseResult,
) -> dict[str, Timing]:
    works: list[tuple[str, Callable[[], None]]] = []
    for one in ready:
        name, work = one.contender.name, _work(one.calls, measure)
        one.timed_by[measure] = "events"
        if device.type == "cuda" and one.contender.captures:
            try:
                work = Captured(work)
                one.timed_by[measure] = "cuda_graph"
            except Exception as error:
                reason = f"no CUDA graph of {measure}, timed by events: {_in_one_line(error)}"
                result.notes.append((name, reason))
        works.append((name, work))
    return interleaved(works, clock=clock, rounds=rounds)


def _record(problem: Problem, one: _Ready) -> dict[str, Any]:
    """A contender's object in the JSON: milliseconds, MiB, TFLOP/s."""
    case = problem.case
    total_ms = one.times["total"].median
    tflops = problem.total_flops / total_ms / 1e9
    peak = None
    if problem.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(problem.device))
    return {
        "shape": list(case.shape),
        "groups": case.num_groups,
        "mask": case.mask,
        "dtype": case.dtype,
        "implementation": one.contender.name,
        "variant": one.variant,
        **{f"{measure}_ms": round(one.times[measure].median, 4) for measure in MEASURES},
        "spread_ms": {measure: round(one.times[measure].spread, 4) for measure in MEASURES},
        "peak_mib": None if one.peak_mib is None else round(one.peak_mib, 1),
        "tflops": round(tflops, 1),
        "share_of_peak": None if peak is None else round(tflops / peak, 4),
        "timed_by": "+".join(sorted(set(one.timed_by.values()))),
        "input_sets": len(one.calls),
        "flops": problem.total_flops,
        "error_over_plain": round(one.verdict.ratio, 3),
        "worst_quantity": one.verdict.quantity,
        "mean_mass_error": one.verdict.mean_mass_error,
    }


def _in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
