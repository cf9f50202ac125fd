"""Fixtures over the cases and runs, comparisons of runs, and what makes tests fast and strict."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from kernels.attention import checks
from kernels.attention.fused.tiles import override_tiles
from tests.kernels import runs
from tests.kernels.cases import GPU_CASES, INTERVAL_CASES, REFERENCE_CASES, Case, GpuCase


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The tensors here are too small to share: threads would spend their time on each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter():
    """Triton's interpreter without what takes two thirds of its time and changes no result.

    It patches ``triton.language`` anew for every call of a device function, makes a table of dtypes
    for every operation, and computes whether each sum of integers overflows, only to drop that.
    """
    if not (checks.HAS_TRITON and checks.INTERPRETED):
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    patch, scopes = interpreter._patch_lang, {}
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def patch_once(function):
        globals_ = function.__globals__.values()
        modules = tuple(m in globals_ for m in (language, language.core))
        if modules not in scopes:
            scopes[modules] = patch(function)
        return SimpleNamespace(restore=lambda: None)

    def np_dtype_once(dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype_once)
        # An assertion, which only a debugging interpreter makes.
        unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
        monkeypatch.setattr(builder, "options", unchecked)
        yield


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=INTERVAL_CASES)
def interval_case(request) -> Case:
    return INTERVAL_CASES[request.param]


@pytest.fixture(scope="session")
def gpu_cases() -> dict[str, GpuCase]:
    """By name, those that the GPU at hand can run."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return {name: case for name, case in GPU_CASES.items() if hopper or "hopper" not in name}


@pytest.fixture(params=GPU_CASES)
def gpu_case(request, gpu_cases) -> GpuCase:
    """One of them, with its tiles in use."""
    if request.param not in gpu_cases:
        pytest.skip("needs a Hopper card")
    with override_tiles(**GPU_CASES[request.param].tiles):
        yield gpu_cases[request.param]


@pytest.fixture(params=INTERVAL_CASES | REFERENCE_CASES)
def any_case(request) -> Case:
    return (INTERVAL_CASES | REFERENCE_CASES)[request.param]


def _assert_agrees(ours, exact, tolerance: float) -> None:
    """Two results of ``run`` agree within ``tolerance`` of each tensor's largest value, or of 1.

    A gradient that ours lacks is not compared.
    """
    (output, gradients), (wanted, wanted_gradients) = ours, exact
    pairs = {"out": (output.out_BTHE, wanted.out_BTHE), "lse": (output.lse_BHT, wanted.lse_BHT)}
    assert (output.statistics is None) == (wanted.statistics is None)
    if wanted.statistics is not None:
        for name, expected in wanted.statistics._asdict().items():
            pairs[name] = (getattr(output.statistics, name), expected)
            assert (pairs[name][0] is None) == (expected is None), name
    pairs |= {name: (value, wanted_gradients[name]) for name, value in gradients.items()}
    for name, (value, expected) in pairs.items():
        if expected is None:
            continue
        largest = expected.detach().masked_fill(expected.isinf(), 0).abs().max().clamp(min=1)
        torch.testing.assert_close(
            value.double(),
            expected.double(),
            rtol=0,
            atol=tolerance * float(largest),
            msg=lambda message, name=name: f"{name}: {message}",
        )


def _assert_no_worse_than_plain(case: Case, dtype: torch.dtype, ours, exact, device="cpu") -> None:
    """out and its gradients err at most twice as much as attention written out in ``dtype``.

    ours, exact: results of ``run`` through out, in ``dtype`` and in fp64.
    """
    plain = runs.plain(case, dtype, device)
    for name in ("out", *ours[1]):
        if name not in plain:
            continue
        value, wanted = (
            run[0].out_BTHE if name == "out" else run[1][name] for run in (ours, exact)
        )
        for norm in (2, math.inf):
            error, allowed = (
                torch.linalg.vector_norm(x.detach().double() - wanted.detach().double(), norm)
                for x in (value, plain[name])
            )
            floor = 1e-6 * torch.linalg.vector_norm(wanted.detach().double(), norm)
            assert error <= 2 * allowed + floor, (name, norm, float(error), float(allowed))


@pytest.fixture
def by_definition():
    return runs.by_definition


@pytest.fixture
def gradients():
    return runs.gradients


@pytest.fixture
def run_case():
    return runs.run


@pytest.fixture
def case_of():
    return Case


@pytest.fixture
def assert_agrees():
    return _assert_agrees


@pytest.fixture
def assert_no_worse_than_plain():
    return _assert_no_worse_than_plain
