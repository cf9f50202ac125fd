"""The gate and its gradient against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import checks
from kernels.errors import UserError
from kernels.swiglu import swiglu

INTERPRETED = pytest.mark.skipif(not checks.INTERPRETED, reason="needs Triton's interpreter")


def error(x, dy, implementation):
    """The larger of output's and gradient's, relative to fp64's norm."""
    x = x.detach().requires_grad_()
    y = swiglu(x, implementation=implementation)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == x.dtype and dx.shape == x.shape
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    (dwanted,) = torch.autograd.grad(wanted, wide, dy.double())
    pairs = ((y, wanted), (dx, dwanted))
    return max(((ours.double() - it).norm() / it.norm()).item() for ours, it in pairs)


def inputs(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(shape, generator=generator)
    dy = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator)
    return x.to(device, dtype), dy.to(device, dtype)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.usefixtures("poisoned_memory")
def test_output_and_gradient_are_those_of_fp64(implementation):
    for shape in ((2, 3, 10), (5, 1100), (1, 2)):
        assert error(*inputs(shape), implementation) < 1e-6
    x, dy = inputs((6, 8))
    assert error(x.T.contiguous().T, dy.T.contiguous().T, implementation) < 1e-6


@INTERPRETED
def test_without_a_token_or_a_width_there_is_nothing():
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        y = swiglu(x, implementation="triton")
        y.sum().backward()
        assert y.shape == (*shape[:-1], shape[-1] // 2) and x.grad.shape == shape


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:triton.runtime.interpreter")
def test_what_is_no_number_stays_none(implementation):
    """And gates far below zero let nothing through, neither way."""
    x = torch.tensor([[float("nan"), 2.0], [2.0, float("inf")], [-200.0, 2.0]], requires_grad=True)
    y = swiglu(x, implementation=implementation)
    y.sum().backward()
    assert y[0].isnan() and x.grad[0].isnan().all()
    assert y[1].isinf() and x.grad[1, 0].isinf()
    assert y[2] == 0 and not x.grad[2].any()


@INTERPRETED
def test_the_operators_keep_their_promises():
    from kernels.swiglu import fused

    x, dy = inputs((3, 8))
    asked = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(fused.fused_swiglu, (x.requires_grad_(),), test_utils=asked)
    torch.library.opcheck(fused._backward, (dy, x.detach()), test_utils=asked)
    (dx,) = torch.autograd.grad(fused.fused_swiglu(x), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(dx.sum(), x)


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match=r"x_P must end in an even axis, got \[2, 3\]"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(UserError, match="implementation must be one of auto, triton, reference"):
        swiglu(torch.zeros(2, 4), implementation="liger")
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(UserError, match="triton can't run tensors on cpu; use reference"):
        swiglu(torch.zeros(2, 4), implementation="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """fp32 as exactly as on a CPU; bf16 no further from fp64 than plain PyTorch, which rounds
    twice."""
    for shape in ((2, 300, 3072), (7, 5, 1000)):
        assert error(*inputs(shape, device="cuda"), "auto") < 1e-6
        half = inputs(shape, torch.bfloat16, "cuda")
        assert error(*half, "auto") <= 1.01 * error(*half, "reference")
