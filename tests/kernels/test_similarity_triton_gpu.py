"""The similarity kernels as a GPU runs them: bf16 and fp16, real shapes, what the hardware adds."""

from typing import NamedTuple

import pytest
import torch

from kernels.masks import IntervalMask
from kernels.similarity import similarity_attention
from tests.kernels.cases import GPU_CASES, Case
from tests.kernels.similarity_runs import KINDS, plain, run, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LONG_ROWS = {
    "T1000": GPU_CASES["documents-T1000-D80-E48-slopes"].case.mask,
    "pinned-window": GPU_CASES["pinned-window-D128-null_H"].case.mask,
}
"""Packed rows of documents of many lengths."""


class GpuCase(NamedTuple):
    dtype: torch.dtype
    case: Case


# The bias is one at which no query's sum of softpick's weights is nearly 0 (0.75 has one of 5e-4):
# nearly all of the error is that one row's then, ours and the allowed one's.
CASES = {
    "causal-D64-bf16": GpuCase(torch.bfloat16, Case(IntervalMask.causal(2, 1024), 4, 4, 64, 64)),
    "documents-T1000-D96-E48-grouped-bias-bf16": GpuCase(
        torch.bfloat16, Case(LONG_ROWS["T1000"], 6, 2, 96, 48, bias=1.5)
    ),
    "pinned-window-D128-fp16": GpuCase(
        torch.float16, Case(LONG_ROWS["pinned-window"], 4, 2, 128, 128)
    ),
    "causal-D256-bf16": GpuCase(torch.bfloat16, Case(IntervalMask.causal(1, 300), 2, 2, 256, 256)),
}
MEASURED = {"statistics": "full", "tap": True, "device": "cuda"}

KINDS_AND_CASES = [
    pytest.param(kind, case, id=f"{case}-{'-'.join(kind)}")
    for case in CASES
    for kind in KINDS
    # Every kind at one head dim, and the two kernels that differ most at the others.
    if case == "causal-D64-bf16"
    or kind in (KINDS[2], KINDS[-1])
    or ("bias" in case and kind == ("sigmoid", "none"))
]


@pytest.mark.parametrize(("kind", "case"), KINDS_AND_CASES)
def test_agrees_with_the_reference(kind, case, assert_agrees):
    """Row sums and statistics have fp32's precision; out and gradients err at most twice as much
    as the same attention written out in the inputs' dtype.
    """
    dtype, case = CASES[case]
    ours = run(case, kind, dtype, implementation="triton", **MEASURED)
    exact = run(case, kind, torch.float64, implementation="reference", **MEASURED)
    measured = []
    for output, gradients in (ours, exact):
        tap = {"key_mass_tap_BHS": gradients["key_mass_tap_BHS"]}
        output.out_BTHE, result = output.lse_BHT, output.out_BTHE
        measured.append((result, (output, tap), gradients))
    assert_agrees(measured[0][1], measured[1][1], tolerance=1e-4)

    for name, allowed in plain(case, kind, dtype, "cuda").items():
        value, wanted = (
            (result if name == "out" else gradients[name]).detach().double()
            for result, _, gradients in measured
        )
        error, limit = (value - wanted).norm(), 2 * (allowed.double() - wanted).norm()
        assert value.isfinite().all()
        # Where e^x passes the dtype's range, attention written out is no number.
        assert limit.isnan() or error <= limit + 1e-6 * wanted.norm(), (name, error, limit)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_two_runs_agree_bitwise(kind):
    dtype, case = CASES["pinned-window-D128-fp16"]
    results = []
    for _ in range(2):
        output, gradients = run(case, kind, dtype, implementation="triton", **MEASURED)
        measured = [x for x in output.statistics if x is not None]
        results.append([output.out_BTHE, output.lse_BHT, *measured, *gradients.values()])
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def on_gpu(name: str, kind: tuple[str, str]):
    dtype, case = CASES[name]
    qkv = [x.detach().cuda().requires_grad_() for x in tensors(case, kind, dtype).values()]
    return qkv, case.mask.to("cuda")


def test_auto_takes_triton_where_it_can():
    qkv, mask = on_gpu("causal-D64-bf16", KINDS[0])
    kind = {"similarity": "sigmoid", "normalize": "none"}
    assert similarity_attention(*qkv, mask, **kind).probabilities_BHTS is None
    few = [x[:, :16].double() for x in qkv]
    exact = similarity_attention(*few, IntervalMask.causal(2, 16).to("cuda"), **kind)
    assert exact.probabilities_BHTS is not None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("tap", [False, True], ids=["no_tap", "tap"])
def test_nothing_waits_for_the_device(tap):
    qkv, mask = on_gpu("documents-T1000-D96-E48-grouped-bias-bf16", KINDS[-1])
    settings = {"similarity": "softpick", "normalize": "sum", "statistics": "full"}
    leaves = list(qkv)
    if tap:
        B, T, H, _ = qkv[0].shape
        tap_BHS = torch.zeros(B, H, T, device="cuda", requires_grad=True)
        settings["key_mass_tap_BHS"] = tap_BHS
        leaves.append(tap_BHS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = similarity_attention(*qkv, mask, implementation="triton", **settings)
        torch.autograd.grad(output.out_BTHE, leaves, output.out_BTHE.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear_in_the_length():
    def peak(num_tokens: int) -> int:
        mask = IntervalMask.causal(1, num_tokens).window(100).to("cuda")
        shape = (1, num_tokens, 4, 64)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        for x in qkv:
            x.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        settings = {"similarity": "softpick", "normalize": "sum", "statistics": "full"}
        output = similarity_attention(*qkv, mask, implementation="triton", **settings)
        output.out_BTHE.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) <= 2.1 * peak(8192)
