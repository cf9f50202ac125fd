"""The Triton operators as PyTorch sees them: layouts, gradients, PyTorch's own checks, FLOPs.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim.
"""

import dataclasses
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import sink_attention
from kernels.errors import UserError
from kernels.masks import IntervalMask
from tests.kernels.interpreted import IN_INTERPRETER, documents

pytest.importorskip("triton")
from kernels.attention.fused.tensors import MaskTensors, as_loadable
from kernels.attention.fused.tiles import Warpgroups, override_tiles

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


def cropped(x_BT: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x_BT, (0, 3))[:, :-3]


def shifted(x_BT: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x_BT.flatten(), (1, 0))[1:].view_as(x_BT)


def expanded(x_BT: torch.Tensor) -> torch.Tensor:
    return x_BT[:1].expand_as(x_BT)


@pytest.mark.parametrize("stored", [cropped, shifted, expanded])
def test_masks_are_read_wherever_they_lie(stored, case_of, run_case, assert_agrees):
    mask = IntervalMask.causal(2, 24).window(5)
    names = ("start_BT", "stop_BT", "document_start_BT")
    elsewhere = dataclasses.replace(mask, **{name: stored(getattr(mask, name)) for name in names})
    tensors = MaskTensors(*(getattr(elsewhere, name) for name in names), 0, False, True)
    for name in names:
        x_BT = getattr(tensors, name)
        assert x_BT.stride() == (24, 1) and x_BT.data_ptr() % 16 == 0
    settings = {"statistics": "full", "tap": True}
    ours = run_case(case_of(elsewhere), torch.float32, implementation="triton", **settings)
    assert_agrees(ours, run_case(case_of(mask), torch.float64, **settings), tolerance=1e-5)


def test_slopes_are_read_wherever_they_lie():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 24, 4, 16, generator=generator).requires_grad_()
    mask = IntervalMask.causal(2, 24)
    slopes = {
        "apart": torch.tensor([0.5, 9.0, 0.25, 9.0, 0.125, 9.0, 1.0, 9.0])[::2],
        "expanded": torch.tensor([0.5]).expand(4),
    }
    for slopes_H in slopes.values():
        ours, exact = (
            sink_attention(q, k, v, mask, slopes_H=slopes_H, implementation=implementation)
            for implementation in ("triton", "reference")
        )
        torch.testing.assert_close(ours.out_BTHE, exact.out_BTHE, rtol=0, atol=1e-5)
        grads = [torch.autograd.grad(x.out_BTHE.square().sum(), [q, k, v]) for x in (ours, exact)]
        for ours_grad, exact_grad in zip(*grads, strict=True):
            torch.testing.assert_close(ours_grad, exact_grad, rtol=0, atol=1e-4)


def test_an_empty_batch_gives_empty_results():
    q, k, v = (torch.zeros(0, 24, 2, 16, requires_grad=True) for _ in range(3))
    ends_BT = torch.zeros(0, 24, dtype=torch.int32)
    mask = IntervalMask(start_BT=ends_BT, stop_BT=ends_BT, document_start_BT=ends_BT)
    results = [
        sink_attention(q, k, v, mask, statistics="full", implementation=implementation)
        for implementation in ("triton", "reference")
    ]
    for ours, exact in zip(results[0].statistics, results[1].statistics, strict=True):
        assert (ours is None) == (exact is None)
        assert ours is None or ours.shape == exact.shape
    results[0].out_BTHE.sum().backward()
    assert q.grad.shape == q.shape


def test_more_programs_than_cuda_counts_are_refused():
    x = torch.zeros(2**15, 1, 2, 16)
    with pytest.raises(UserError, match=r"can't run 65536 rows x heads \(at most 65535\)"):
        sink_attention(x, x, x, IntervalMask.causal(2**15, 1), implementation="triton")


def test_programs_that_there_are_not_are_refused():
    for settings in ({"groups": 4, "stages": 2}, {"groups": 1, "stages": 1, "overlap": True}):
        with pytest.raises(ValueError, match="no program of Hopper's has this tile"):
            Warpgroups(rows=64, **settings)
    q, k, v = (torch.zeros(1, 24, 2, 16) for _ in range(3))
    hopper = Warpgroups(groups=1, rows=64, stages=2)
    with override_tiles(forward=hopper), pytest.raises(ValueError, match="Hopper's program can't"):
        sink_attention(q, k, v, IntervalMask.causal(1, 24), implementation="triton")
