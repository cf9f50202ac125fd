"""What a forced Triton says where it can't run, whichever attention it is."""

from collections.abc import Callable

import pytest
import torch

from kernels.attention import checks
from kernels.errors import UserError


def check_refusals(monkeypatch, call: Callable[[torch.dtype], object]) -> None:
    """``call`` forces Triton on tensors of that dtype on a CPU: each lack has its own line."""

    def refusal(dtype=torch.float32) -> str:
        with pytest.raises(UserError) as caught:
            call(dtype)
        return str(caught.value)

    start = "attention.implementation triton can't run"
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", True)
    assert refusal(torch.float64) == f"{start} torch.float64; use reference"
    assert refusal(torch.bfloat16) == (
        f"{start} torch.bfloat16 in Triton's interpreter, which computes it wrongly; use reference"
    )
    monkeypatch.setattr(checks, "INTERPRETED", False)
    assert refusal() == f"{start} tensors on cpu; use reference"
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    assert refusal() == f"{start} without the package triton; use reference"
