"""Masks and the reference on a GPU: the same numbers, and no wait for the device."""

import pytest
import torch

from kernels.attention import sink_attention
from kernels.masks import IntervalMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(mask, tensors):
    moved = {name: x.detach().cuda() for name, x in tensors.items()}
    positional = [moved.pop(name) for name in ("q_BTHD", "k_BTGD", "v_BTGE")]
    return sink_attention(*positional, mask.to("cuda"), statistics="full", **moved)


def test_the_reference_gives_the_same_numbers(any_case, run_case):
    expected, _ = run_case(any_case, torch.float64, statistics="full", implementation="reference")
    output = on_gpu(any_case.mask, any_case.tensors(torch.float64))
    torch.testing.assert_close(output.out_BTHE.cpu(), expected.out_BTHE, rtol=0, atol=1e-10)
    for ours, wanted in zip(output.statistics, expected.statistics, strict=True):
        if wanted is not None:
            torch.testing.assert_close(ours.cpu(), wanted, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device(case_of):
    mask = IntervalMask.from_documents(torch.tensor([[0, 1, 1, 2, -1]]), pinned=1)
    case = case_of(mask, null="H", slopes=True, buckets=4)
    tensors = {name: x.detach().cuda() for name, x in case.tensors(torch.float32).items()}
    positional = [tensors.pop(name) for name in ("q_BTHD", "k_BTGD", "v_BTGE")]
    mask = mask.pin_memory().to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        derived = mask.window(2).prefix(2)
        derived.queries_per_key_BS(), derived.keys_per_query_BT(), derived.to_dense().window(3)
        sink_attention(*positional, derived, statistics="full", **tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
