"""How fast a card could be: what MFU is a share of."""

import pytest
import torch

from train.devices import peak_flops

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("A card of next year", None),
    ],
)
def test_the_peak_is_of_dense_bf16(monkeypatch, name, peak):
    """Lightning has an H200's with sparsity, twice as much, and warns of names that it can't read,
    which ended runs where warnings are errors."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(CUDA, torch.bfloat16) == peak


def test_the_peak_of_fp32_is_of_the_products_that_are_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(CUDA, torch.float32) == 494.7e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops(CUDA, torch.float32) == 66.9e12


def test_a_cpu_has_none():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
