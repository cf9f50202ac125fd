"""The Triton kernels as a GPU runs them: every dtype, real shapes, what the hardware adds.

Run as a script with the name of a case, it prints the digest of all that comes out.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kernels.attention import sink_attention
from kernels.masks import IntervalMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # One worker has them all: each that has some runs all of ``digests``.
    pytest.mark.xdist_group("attention_triton_gpu"),
]

MEASURED = {"statistics": "full", "tap": True}
WAYS = {"full-tap": MEASURED, "basic": {"statistics": "basic"}, "off": {"statistics": "off"}}

# Cases that are run in all these ways, the others only in the first.
ALL_WAYS = [
    "causal-D64",
    "causal-D64-hopper_3",
    "documents-D64-null_BHT",
    "documents-D64-null_BHT-hopper_1",
]


@contextmanager
def poisoned_memory():
    """Uninitialised memory is NaN. Only around the kernels: cuBLAS refuses to run in this mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_triton(run_case, gpu_case, *args, **settings):
    settings |= {"device": "cuda", "implementation": "triton"}
    with poisoned_memory():
        return run_case(gpu_case.case, gpu_case.dtype, *args, **settings)


def run_exact(run_case, gpu_case, *args, **settings):
    settings |= {"device": "cuda", "implementation": "reference"}
    return run_case(gpu_case.case, torch.float64, *args, **settings)


def digest(run_case, gpu_case) -> str:
    """sha256 of out, lse, gradients and statistics, in all the ways that the case is run."""
    sha256 = hashlib.sha256()
    for way in WAYS if gpu_case.name in ALL_WAYS else ["full-tap"]:
        output, gradients = run_triton(run_case, gpu_case, **WAYS[way])
        for x in (output.out_BTHE, output.lse_BHT, *(output.statistics or ()), *gradients.values()):
            if x is not None:
                sha256.update(x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sha256.hexdigest()


@pytest.fixture(scope="module", autouse=True)
def digests(gpu_cases) -> dict[str, str]:
    """By case, the digest or what went wrong, each from a process of its own.

    Most of their time goes into compiling kernels, which the tests then find in Triton's cache; so
    they run before the first test, as many at once as there are cores.
    """
    root = Path(__file__).parents[2]

    def output_of(name: str) -> str:
        process = subprocess.run(
            [sys.executable, __file__, name],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return process.stdout.strip()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(gpu_cases, pool.map(output_of, gpu_cases), strict=True))


def test_two_processes_agree_bitwise(gpu_case, digests, run_case):
    # Warnings may come first.
    theirs = digests[gpu_case.name]
    assert theirs.endswith(digest(run_case, gpu_case)), theirs


def test_agrees_with_the_reference(gpu_case, run_case, assert_agrees):
    """lse and statistics have the precision of fp32 in bf16 and fp16 too; all else has in fp32."""
    runs = [run(run_case, gpu_case, **MEASURED) for run in (run_triton, run_exact)]
    queries_B1S = gpu_case.case.mask.queries_per_key_BS()[:, None].clamp(min=1).cuda()
    alphas = [gradients["key_mass_tap_BHS"] / queries_B1S for _, gradients in runs]
    torch.testing.assert_close(alphas[0].double(), alphas[1], rtol=0, atol=1e-3)
    if gpu_case.dtype is not torch.float32:
        runs = [
            (output._replace(out_BTHE=output.lse_BHT), {"key_mass_tap_BHS": gradients.popitem()[1]})
            for output, gradients in runs
        ]
    assert_agrees(*runs, tolerance=1e-4)


def test_errs_no_more_than_attention_written_out(gpu_case, run_case, assert_no_worse_than_plain):
    if gpu_case.dtype is torch.float32:
        pytest.skip("fp32 agrees with the reference")
    # The kernels of the first test.
    ours = run_triton(run_case, gpu_case, "out", **MEASURED)
    exact = run_exact(run_case, gpu_case, "out", statistics="off")
    assert_no_worse_than_plain(gpu_case.case, gpu_case.dtype, ours, exact, device="cuda")


@pytest.mark.parametrize("way", ["full-tap", "basic"])
@pytest.mark.parametrize("gpu_case", ALL_WAYS, indirect=True)
def test_mass_adds_up_to_the_non_empty_queries(gpu_case, way, run_case):
    output, gradients = run_triton(run_case, gpu_case, **WAYS[way])
    key_mass_BHS = output.statistics.key_mass_BHS
    if key_mass_BHS is None:
        key_mass_BHS = gradients["key_mass_tap_BHS"]
    total_BH = key_mass_BHS.sum(-1)
    if gpu_case.case.null:
        total_BH = total_BH + output.statistics.null_mass_BHT.sum(-1)
    queries_B1 = (gpu_case.case.mask.keys_per_query_BT() > 0).sum(1, keepdim=True).cuda()
    assert ((total_BH - queries_B1).abs() <= 1e-4 * queries_B1).all()


@pytest.mark.parametrize("gpu_case", ALL_WAYS, indirect=True)
def test_levels_change_no_output(gpu_case, run_case):
    full, *others = (run_triton(run_case, gpu_case, **settings) for settings in WAYS.values())
    assert others[-1][0].statistics is None
    for output, gradients in others:
        torch.testing.assert_close(output.lse_BHT, full[0].lse_BHT, rtol=1e-5, atol=1e-5)
        for name, value in gradients.items():
            # Tiles may differ by level, and with them the rounding.
            torch.testing.assert_close(value, full[1][name], rtol=0.02, atol=0.02, msg=name)


def on_gpu(gpu_case):
    """q, k, v, the other arguments by name, and the mask, on the device."""
    leaves = {
        name: x.detach().cuda().requires_grad_()
        for name, x in gpu_case.case.tensors(gpu_case.dtype).items()
    }
    return [leaves.pop(name) for name in list(leaves)[:3]], leaves, gpu_case.case.mask.to("cuda")


def test_auto_takes_triton_where_it_can(gpu_cases):
    (q, k, v), _, mask = on_gpu(gpu_cases["causal-D64"])
    assert sink_attention(q, k, v, mask).probabilities_BHTS is None
    few = [x[:, :16].double() for x in (q, k, v)]
    exact = sink_attention(*few, IntervalMask.causal(2, 16).to("cuda"))
    assert exact.probabilities_BHTS is not None


@pytest.mark.parametrize("gpu_case", ALL_WAYS[:2], indirect=True)
def test_strides_are_read_as_they_are(gpu_case):
    """The same bits whether q, k and v are alone in memory or parts of one projection."""
    (q, k, v), _, mask = on_gpu(gpu_case)
    fused_BTF = torch.cat([x.detach().flatten(2) for x in (q, k, v)], -1)
    views = fused_BTF.unflatten(-1, (3, *q.shape[2:])).unbind(2)
    results = []
    for tensors in ((q, k, v), views):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = sink_attention(*leaves, mask, statistics="full", implementation="triton")
        gradients = torch.autograd.grad(output.out_BTHE, leaves, output.out_BTHE.detach())
        measured = [x for x in output.statistics if x is not None]
        results.append([output.out_BTHE, output.lse_BHT, *measured, *gradients])
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def test_a_query_that_is_nan_has_no_mass(gpu_cases):
    """A NaN must not pass for the largest mass there is."""
    (q, k, v), _, mask = on_gpu(gpu_cases["causal_across-D40-portable"])
    q.detach()[0, 5] = torch.nan
    measured = sink_attention(q, k, v, mask, implementation="triton").statistics
    assert measured.first_mass_BHT[0, :, 5].isnan().all()
    assert measured.document_mass_BHT[0, :, 5].isnan().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("tap", [False, True], ids=["no_tap", "tap"])
@pytest.mark.parametrize("gpu_case", ALL_WAYS, indirect=True)
def test_nothing_waits_for_the_device(gpu_case, tap):
    qkv, extras, mask = on_gpu(gpu_case)
    leaves = [*qkv, *extras.values()]
    settings = {"statistics": "full", "implementation": "triton", **extras}
    if tap:
        B, T, H, _ = qkv[0].shape
        tap_BHS = torch.zeros(B, H, T, device="cuda", requires_grad=True)
        leaves.append(tap_BHS)
        settings["key_mass_tap_BHS"] = tap_BHS
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = sink_attention(*qkv, mask, **settings)
        dout, dlse = output.out_BTHE.detach(), torch.ones_like(output.lse_BHT)
        torch.autograd.grad([output.out_BTHE, output.lse_BHT], leaves, [dout, dlse])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", ["causal", "window"])
def test_memory_is_linear_in_the_length(masked):
    """A row of 16k tokens costs twice what a row of 8k costs, backward pass included."""

    def peak(num_tokens: int) -> int:
        mask, extras = IntervalMask.causal(1, num_tokens), {}
        if masked == "window":
            mask = mask.window(100)
            extras["null_logit"] = torch.zeros(1, 4, num_tokens, device="cuda")
        mask = mask.to("cuda")
        qkv = [
            torch.randn(1, num_tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        ]
        for x in qkv:
            x.requires_grad_()
        tap_BHS = torch.zeros(1, 4, num_tokens, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = sink_attention(
            *qkv,
            mask,
            statistics="full",
            key_mass_tap_BHS=tap_BHS,
            implementation="triton",
            **extras,
        )
        output.out_BTHE.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) <= 2.1 * peak(8192)


if __name__ == "__main__":
    from kernels.attention.fused.tiles import override_tiles
    from tests.kernels.cases import GPU_CASES
    from tests.kernels.runs import run

    chosen = GPU_CASES[sys.argv[1]]
    with override_tiles(**chosen.tiles):
        print(digest(run, chosen))
