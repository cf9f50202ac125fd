"""The Triton operators as PyTorch sees them: layouts, gradients, PyTorch's own checks, FLOPs.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim.
"""

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import sink_attention
from kernels.masks import IntervalMask
from tests.kernels.interpreted import IN_INTERPRETER, documents

pytest.importorskip("triton")
from kernels.attention.fused.tensors import as_loadable

pytestmark = IN_INTERPRETER


def layouts() -> dict[str, tuple[torch.Tensor, ...]]:
    """q, k, v [1, 21, 2, 16] with the same numbers, stored in different ways."""
    generator = torch.Generator().manual_seed(0)
    qkv_3BTHD = torch.randn(3, 1, 21, 2, 16, generator=generator)
    fused_BTF = qkv_3BTHD.permute(1, 2, 0, 3, 4).reshape(1, 21, 96)
    heads_first_3BHTD = qkv_3BTHD.transpose(2, 3).contiguous()
    return {
        "contiguous": qkv_3BTHD.unbind(0),
        "one_projection": fused_BTF.unflatten(-1, (3, 2, 16)).unbind(2),
        "heads_first": heads_first_3BHTD.transpose(2, 3).unbind(0),
        "part_of_a_wider_head": torch.nn.functional.pad(qkv_3BTHD, (0, 4))[..., :16].unbind(0),
    }


@cache
def attend(layout: str) -> list[torch.Tensor]:
    """All that attention and its backward pass give."""
    tensors = [x.detach().requires_grad_() for x in layouts()[layout]]
    assert all(as_loadable(x) is x for x in tensors)
    output = sink_attention(*tensors, documents(9, 12), statistics="full", implementation="triton")
    # The gradient has the layout of a projection's, too.
    dout = output.out_BTHE.detach().transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(
        [output.out_BTHE, output.lse_BHT], tensors, [dout, dout[..., 0].mT]
    )
    measured = [x for x in output.statistics if x is not None]
    return [output.out_BTHE, output.lse_BHT, *measured, *gradients]


@pytest.mark.parametrize("layout", ["one_projection", "heads_first", "part_of_a_wider_head"])
def test_strides_are_read_as_they_are(layout):
    """No copies on the way in, and the same bits out, whatever the layout."""
    for ours, wanted in zip(attend(layout), attend("contiguous"), strict=True):
        assert torch.equal(ours, wanted)


def test_what_the_hardware_cannot_read_is_copied():
    x = torch.randn(1, 21, 2, 16)
    misaligned = torch.randn(x.numel() + 1)[1:].view(x.shape)
    gaps_in_the_last_axis = torch.randn(1, 21, 2, 32)[..., ::2]
    odd_steps = torch.randn(1, 21, 2, 17)[..., :16]
    expanded = torch.randn(1, 1, 1, 16).expand(x.shape)
    for y in (misaligned, gaps_in_the_last_axis, odd_steps, expanded):
        loadable = as_loadable(y)
        assert loadable.is_contiguous() and torch.equal(loadable, y)
        assert loadable is not y and loadable.data_ptr() % 16 == 0
    # An axis of one element is never stepped along, whatever its stride.
    assert as_loadable(x.as_strided(x.shape, (1, *x.stride()[1:]))).data_ptr() == x.data_ptr()


def test_a_gradient_expanded_from_a_scalar(case_of):
    case = case_of(documents(9, 12), H=2, G=1)
    results = []
    for implementation in ("triton", "cpu"):
        tensors = list(case.tensors(torch.float32).values())
        output = sink_attention(*tensors, case.mask, implementation=implementation)
        results.append(torch.autograd.grad(output.out_BTHE.sum(), tensors))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_only_what_needs_a_gradient_has_one(case_of):
    case = case_of(documents(9, 12), H=2, G=1)
    q, k, v = (x.detach() for x in case.tensors(torch.float32).values())
    output = sink_attention(q, k, v.requires_grad_(), case.mask, implementation="triton")
    output.out_BTHE.sum().backward()
    assert v.grad.isfinite().all() and q.grad is None and k.grad is None
    with torch.no_grad():
        output = sink_attention(q, k, v, case.mask, implementation="triton")
    assert not output.out_BTHE.requires_grad and not output.lse_BHT.requires_grad


def operator_inputs(null: bool, tap: bool, is_causal: bool):
    """Arguments of ``sinklab::attention``: leaves, mask, numbers; no query sees nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 2, 8), (1, 6, 1, 8), (1, 6, 1, 4)]
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    leaves.append(torch.randn(1, 2, 6, generator=generator, requires_grad=True) if null else None)
    leaves.append(torch.zeros(1, 2, 6, requires_grad=True) if tap else None)
    mask = IntervalMask.causal(1, 6) if is_causal else IntervalMask.causal(1, 6).window(3)
    return leaves, (mask.start_BT, mask.stop_BT), (mask.pinned, mask.is_causal)


OPERATORS = torch.ops.sinklab


@pytest.mark.parametrize(
    ("null", "tap", "is_causal", "level"),
    [(False, False, True, "off"), (True, True, False, "full")],
    ids=["off-causal", "full-null-tap-window"],
)
def test_the_operators_pass_pytorchs_own_checks(null, tap, is_causal, level):
    leaves, intervals, kind = operator_inputs(null, tap, is_causal)
    document_start = torch.zeros_like(intervals[0])
    where = (None, *intervals, document_start, *kind, True, 0.3, level)
    torch.library.opcheck(OPERATORS.attention.default, (*leaves, *where))
    q, k, v, *extras = (x if x is None else x.detach() for x in leaves)
    out, lse, *_ = OPERATORS.attention(q, k, v, *extras, *where)
    dlse = torch.ones_like(lse) if null else None
    torch.library.opcheck(
        OPERATORS.attention_backward.default,
        (out, dlse, q, k, v, out, lse, None, *intervals, *kind, 0.3, level),
    )
    torch.library.opcheck(OPERATORS.key_mass.default, (q, k, lse, None, *intervals, *kind, 0.3))


def test_products_are_counted():
    leaves, intervals, kind = operator_inputs(null=False, tap=False, is_causal=True)
    document_start = torch.zeros_like(intervals[0])
    with FlopCounterMode(display=False) as counter:
        out, lse, *_ = OPERATORS.attention(
            *leaves, None, *intervals, document_start, *kind, True, 0.3, "basic"
        )
        out.sum().backward()
        OPERATORS.key_mass(*leaves[:2], lse, None, *intervals, *kind, 0.3)
    pairs, D, E = 2 * 6 * 6, 8, 4
    assert counter.get_flop_counts()["Global"] == {
        OPERATORS.attention: 2 * pairs * (D + E),
        OPERATORS.attention_backward: 2 * pairs * (3 * D + 2 * E),
        OPERATORS.key_mass: 2 * pairs * D,
    }
