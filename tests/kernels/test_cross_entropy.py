"""The loss and its gradients against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import checks
from kernels.cross_entropy import IGNORE_LABEL, linear_cross_entropy
from kernels.errors import UserError

INTERPRETED = pytest.mark.skipif(not checks.INTERPRETED, reason="needs Triton's interpreter")
# Triton's interpreter computes what `where` then drops; NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def inputs(num_tokens=9, width=6, vocab_size=37, padded=40, dtype=torch.float32, device="cpu"):
    """x, weight with rows that mustn't count, labels with some to be left out."""
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(num_tokens, width, generator=generator)
    weight_VC = torch.randn(padded, width, generator=generator)
    weight_VC[vocab_size:] = 100.0
    labels_N = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_N[::4] = IGNORE_LABEL
    x_NC, weight_VC = x_NC.to(device, dtype), weight_VC.to(device)
    return x_NC.requires_grad_(), weight_VC.requires_grad_(), labels_N.to(device), vocab_size


def expected(x_NC, weight_VC, labels_N, vocab_size, scale):
    """In fp64, of what is rounded to x's dtype."""
    x_NC = x_NC.detach().double().requires_grad_()
    weight_VC = weight_VC.detach().to(x_NC.dtype).double().requires_grad_()
    logits_NV = F.linear(x_NC, weight_VC)[:, :vocab_size]
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_LABEL, reduction="sum")
    return loss, torch.autograd.grad(scale * loss, (x_NC, weight_VC))


def check(implementation, scale=0.25, tolerance=1e-5, **shape):
    x_NC, weight_VC, labels_N, vocab_size = inputs(**shape)
    loss = linear_cross_entropy(
        x_NC, weight_VC, labels_N, vocab_size=vocab_size, implementation=implementation
    )
    found = torch.autograd.grad(scale * loss, (x_NC, weight_VC))
    wanted_loss, wanted = expected(x_NC, weight_VC, labels_N, vocab_size, scale)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=tolerance, atol=0)
    for ours, theirs, leaf in zip(found, wanted, (x_NC, weight_VC), strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert not found[1][vocab_size:].any(), "padding has a gradient"


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_loss_and_gradients_are_those_of_fp64(implementation):
    check(implementation)
    check(implementation, vocab_size=40)
    # Less than the eight logits of a thread, and rows that don't begin where eight do.
    for vocab_size, padded in ((1, 1), (2, 3), (7, 7), (9, 11)):
        check(implementation, vocab_size=vocab_size, padded=padded)


@INTERPRETED
@pytest.mark.usefixtures("poisoned_memory")
def test_slices_and_tiles_change_nothing(monkeypatch):
    from kernels.cross_entropy import fused

    monkeypatch.setattr(fused, "SLICE_LOGITS", 3 * 40)
    monkeypatch.setattr(fused, "MAX_TILE", 16)
    check("triton", num_tokens=11)
    check("triton", num_tokens=2)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_the_loss_of_sure_predictions_is_as_exact_as_any(implementation):
    """It is 0.003 beside logits of 138 and 184, whose rounding would be a percent of it."""
    weight_VC = torch.arange(-13.0, 24.0)[:, None]
    x_NC, labels_N = torch.tensor([[6.0], [8.0]]), torch.tensor([36, 36])
    loss = linear_cross_entropy(x_NC, weight_VC, labels_N, implementation=implementation)
    wanted = F.cross_entropy((x_NC @ weight_VC.T).double(), labels_N, reduction="sum")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("place", [0, 8, 35, 36])
def test_a_logit_that_is_no_number_reaches_loss_and_gradients(implementation, place, monkeypatch):
    """In the first and in a later tile, the first and the last of eight, the label's or another;
    an infinite one is as bad, one of the padding changes nothing."""
    if implementation == "triton":
        from kernels.cross_entropy import fused

        monkeypatch.setattr(fused, "MAX_TILE", 16)
    labels_N = torch.tensor([35, 2, IGNORE_LABEL])
    for value in (float("nan"), float("inf")):
        weight_VC = torch.ones(40, 1)
        weight_VC[[place, 38]] = value
        arguments = (torch.ones(3, 1, requires_grad=True), weight_VC.requires_grad_(), labels_N)
        options = {"vocab_size": 37, "implementation": implementation}
        loss = linear_cross_entropy(*arguments, **options)
        (dweight_VC,) = torch.autograd.grad(loss, weight_VC)
        assert loss.isnan() and dweight_VC[:37].isnan().all()
        weight_VC = weight_VC.detach().clone()
        weight_VC[place] = 1.0
        assert linear_cross_entropy(arguments[0], weight_VC, labels_N, **options).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slice_logits", [100 * 9024, 2**30])
def test_on_a_gpu(slice_logits, monkeypatch):
    """fp32 as exactly as on a CPU; in bf16 the error is plain PyTorch's, that of rounded logits."""
    from kernels.cross_entropy import fused

    monkeypatch.setattr(fused, "SLICE_LOGITS", slice_logits)
    large = {"num_tokens": 300, "width": 64, "vocab_size": 9001, "padded": 9024, "device": "cuda"}
    check("auto", **large)
    arguments = inputs(dtype=torch.bfloat16, **large)
    wanted = expected(*arguments, 1.0)[1]
    ours, plain = (errors(name, *arguments, wanted) for name in ("triton", "reference"))
    assert all(mine <= 1.05 * its for mine, its in zip(ours, plain, strict=True)), (ours, plain)


def errors(implementation, x_NC, weight_VC, labels_N, vocab_size, wanted):
    """Of the gradients, relative."""
    loss = linear_cross_entropy(
        x_NC, weight_VC, labels_N, vocab_size=vocab_size, implementation=implementation
    )
    found = torch.autograd.grad(loss, (x_NC, weight_VC))
    return [
        ((ours.double() - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(found, wanted, strict=True)
    ]


@INTERPRETED
def test_without_a_gradient_none_is_made():
    x_NC, weight_VC, labels_N, vocab_size = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(
            x_NC, weight_VC, labels_N, vocab_size=vocab_size, implementation="triton"
        )
    wanted, _ = expected(x_NC, weight_VC, labels_N, vocab_size, 1.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_without_a_token_or_a_label_there_is_no_loss_and_no_gradient(implementation):
    x_NC, weight_VC, labels_N, _ = inputs()
    for x, labels in ((x_NC[:0], labels_N[:0]), (x_NC, torch.full_like(labels_N, IGNORE_LABEL))):
        loss = linear_cross_entropy(x, weight_VC, labels, implementation=implementation)
        dx, dweight_VC = torch.autograd.grad(loss, (x, weight_VC))
        assert loss == 0 and not dx.any() and not dweight_VC.any()


@INTERPRETED
def test_a_label_without_a_logit_stops_training():
    x_NC, weight_VC, labels_N, vocab_size = inputs()
    labels_N[1] = vocab_size
    loss = linear_cross_entropy(
        x_NC, weight_VC, labels_N, vocab_size=vocab_size, implementation="triton"
    )
    gradients = torch.autograd.grad(loss, (x_NC, weight_VC))
    assert all(value.isnan().any() for value in (loss, *gradients))


@INTERPRETED
def test_the_operator_keeps_its_promises():
    """Also where x isn't contiguous: shapes and strides are those that a compiler was told."""
    from kernels.cross_entropy import fused

    x_NC, weight_VC, labels_N, vocab_size = inputs()
    x_NC = x_NC.detach().T.contiguous().T.requires_grad_()
    arguments = (x_NC, weight_VC, labels_N, vocab_size)
    asked = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(fused._linear_cross_entropy, (*arguments, True), test_utils=asked)
    loss = fused.fused_linear_cross_entropy(*arguments)
    (dx_NC,) = torch.autograd.grad(loss, x_NC, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(dx_NC.square().sum(), x_NC)


def test_refusals(monkeypatch):
    x_NC, weight_VC, labels_N, _ = inputs()
    with pytest.raises(UserError, match="vocab_size must be from 1 to 40, the rows of the weight"):
        linear_cross_entropy(x_NC, weight_VC, labels_N, vocab_size=41)
    with pytest.raises(UserError, match=r"labels_N must be int64 of shape \[9\], one a token"):
        linear_cross_entropy(x_NC, weight_VC, labels_N[1:])

    def refusal(implementation, dtype=torch.float32):
        with pytest.raises(UserError) as caught:
            linear_cross_entropy(x_NC.to(dtype), weight_VC, labels_N, implementation=implementation)
        return str(caught.value)

    assert refusal("liger") == (
        "implementation must be one of auto, triton, reference, got 'liger'"
    )
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    assert refusal("triton") == "implementation triton can't run tensors on cpu; use reference"
    monkeypatch.setattr(checks, "INTERPRETED", True)
    assert "float64; use reference" in refusal("triton", torch.float64)
    assert "float16 in Triton's interpreter; use" in refusal("triton", torch.float16)
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    assert "without the package triton" in refusal("triton")
