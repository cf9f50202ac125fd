"""What a caller of ``sink_attention`` relies on: choice, errors, taps, compile, checkpointing."""

import logging
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import StatisticsLevel, api, checks, sink_attention
from kernels.errors import UserError
from kernels.masks import DenseMask, IntervalMask
from tests.kernels.refusals import check_refusals

# Triton's interpreter computes what `where` then drops; NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

B, T, H, G, D, E = 2, 9, 4, 2, 8, 4
INTERPRETED = pytest.mark.skipif(
    not (checks.HAS_TRITON and checks.INTERPRETED), reason="needs Triton's interpreter"
)
IMPLEMENTATIONS = ["reference", "cpu", pytest.param("triton", marks=INTERPRETED)]


def inputs(dtype=torch.float32, **changes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q_BTHD": (B, T, H, D), "k_BTGD": (B, T, G, D), "v_BTGE": (B, T, G, E), **changes}
    return {
        name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }


def packed() -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor([[1] * 4 + [2] * 5, [1] * 7 + [-1] * 2]))


def zeros_tap() -> Tensor:
    return torch.zeros(B, H, T, requires_grad=True)


def attend(mask=None, **settings):
    return sink_attention(**inputs(), mask=packed() if mask is None else mask, **settings)


WRONG = {
    "q_axes": (dict(q_BTHD=(B, T, D)), {}, "attention.q must be [B, T, heads, D], got (2, 9, 8)"),
    "heads": (dict(q_BTHD=(B, T, 5, D)), {}, "must have a number of heads that divides q's 5"),
    "head_dim": (dict(k_BTGD=(B, T, G, 7)), {}, "attention.k must have shape (2, 9, 2, 8)"),
    "tokens": (dict(v_BTGE=(B, 8, G, E)), {}, "attention.v must have shape (2, 9, 2, 4)"),
    "groups": (dict(v_BTGE=(B, T, H, E)), {}, "attention.v must have shape (2, 9, 2, 4)"),
    "mask": (
        {},
        {"mask": IntervalMask.causal(B, 8)},
        "attention.mask must be of 2 rows of 9 tokens, as q [B, T, H, D] is, got (2, 8)",
    ),
    "mask_bool": (
        {},
        {"mask": torch.ones(T, T, dtype=torch.bool)},
        "attention.mask must be an IntervalMask or a DenseMask, got",
    ),
    "mask_device": (
        {},
        {"mask": packed().to("meta")},
        "attention.mask must be on cpu as q is, got device(type='meta')",
    ),
    "null_number": ({}, {"null_logit": 0.0}, "attention.null_logit must be a tensor, got 'float'"),
    "null_int": (
        {},
        {"null_logit": torch.zeros(H, dtype=torch.int64)},
        "attention.null_logit must be floating point, got torch.int64",
    ),
    "scale": ({}, {"scale": math.nan}, "attention.scale must be a finite number of fp32, got nan"),
    "no_head_dim": (
        dict(q_BTHD=(B, T, H, 0), k_BTGD=(B, T, G, 0)),
        {},
        "attention.q must have a head dim",
    ),
    "null": ({}, {"null_logit": torch.zeros(3)}, "attention.null_logit must have shape (4,) or"),
    "slopes": ({}, {"slopes_H": torch.zeros(3)}, "attention.slopes must have shape (4,)"),
    "bias": ({}, {"bias_HR": torch.zeros(4, 1)}, "attention.bias must have shape (4, 2 to 128)"),
    "tap": (
        {},
        {"key_mass_tap_BHS": torch.zeros(B, H, 8)},
        "attention.key_mass_tap must have shape (2, 4, 9)",
    ),
    "tap_off": (
        {},
        {"key_mass_tap_BHS": zeros_tap(), "statistics": "off"},
        "statistics must be basic or full where a key mass tap is passed, got 'off'",
    ),
    "tap_leaf": (
        {},
        {"key_mass_tap_BHS": torch.zeros(B, H, T)},
        "attention.key_mass_tap must require a gradient, got False",
    ),
    "levels": ({}, {"statistics": ["full"]}, "statistics must be one of off, basic, full, got"),
    "level": ({}, {"statistics": "some"}, "statistics must be one of off, basic, full, got 'some'"),
    "implementation": (
        {},
        {"implementation": "fast"},
        "attention.implementation must be one of auto, reference, cpu, triton, got 'fast'",
    ),
    "cpu_dense": (
        {},
        {"implementation": "cpu", "mask": packed().to_dense()},
        "attention.implementation cpu can't run a dense mask; use reference",
    ),
    "cpu_slopes": (
        {},
        {"implementation": "cpu", "slopes_H": torch.zeros(H)},
        "attention.implementation cpu can't run slopes or a relative bias; use reference",
    ),
    "triton_dense": (
        {},
        {"implementation": "triton", "mask": packed().to_dense()},
        "attention.implementation triton can't run a dense mask; use reference",
    ),
    "triton_bias": (
        {},
        {"implementation": "triton", "bias_HR": torch.zeros(H, 4)},
        "attention.implementation triton can't run a relative bias; use reference",
    ),
    "triton_slopes": (
        {},
        {"implementation": "triton", "slopes_H": torch.zeros(H, requires_grad=True)},
        "attention.implementation triton can't run slopes that need a gradient; use reference",
    ),
    "triton_scale": (
        {},
        {"implementation": "triton", "scale": -0.5},
        "attention.implementation triton can't run a scale that isn't positive (-0.5); use ref",
    ),
    "triton_head_dim": (
        dict(q_BTHD=(B, T, H, 10), k_BTGD=(B, T, G, 10)),
        {"implementation": "triton"},
        "attention.implementation triton can't run head dim 10 (only multiples of 4 up to 256);",
    ),
    "triton_value_head_dim": (
        dict(v_BTGE=(B, T, G, 260)),
        {"implementation": "triton"},
        "attention.implementation triton can't run head dim 260 (only multiples of 4 up to 256);",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_named(wrong, monkeypatch):
    if wrong.startswith("triton"):
        # Elsewhere the machine, or tensors on its CPU, would be what is refused.
        monkeypatch.setattr(checks, "HAS_TRITON", True)
        monkeypatch.setattr(checks, "INTERPRETED", True)
    shapes, settings, message = WRONG[wrong]
    with pytest.raises(UserError) as caught:
        sink_attention(**{**inputs(**shapes), "mask": packed(), **settings})
    assert message in str(caught.value)


def test_wrong_dtypes_are_named():
    tensors = inputs()
    with pytest.raises(UserError, match=r"attention\.k must be torch\.float32, got torch\.float64"):
        sink_attention(**{**tensors, "k_BTGD": tensors["k_BTGD"].double()}, mask=packed())
    with pytest.raises(UserError, match=r"attention\.q must be floating point, got torch\.int64"):
        sink_attention(**{name: x.long() for name, x in tensors.items()}, mask=packed())
    halves = {name: x.bfloat16() for name, x in tensors.items()}
    with pytest.raises(
        UserError, match=r"cpu can't run torch\.bfloat16 \(only float32 and float64"
    ):
        sink_attention(**halves, mask=packed(), implementation="cpu")


def test_triton_names_what_it_lacks(monkeypatch):
    """A forced choice that can't run says why, whether the tensors or the machine are at fault."""

    def call(dtype: torch.dtype) -> None:
        tensors = {name: x.to(dtype) for name, x in inputs().items()}
        sink_attention(**tensors, mask=packed(), implementation="triton")

    check_refusals(monkeypatch, call)


@pytest.mark.parametrize(
    ("chosen", "settings"),
    [
        ("cpu", {}),
        ("cpu", {"null_logit": torch.zeros(H)}),
        ("reference", {"mask": packed().to_dense()}),
        ("reference", {"slopes_H": torch.zeros(H)}),
        ("reference", {"bias_HR": torch.zeros(H, 4)}),
    ],
    ids=["plain", "null", "dense", "slopes", "bias"],
)
def test_auto_takes_the_cpu_implementation_where_it_can(chosen, settings):
    has_probabilities = attend(**settings).probabilities_BHTS is not None
    assert has_probabilities == (chosen == "reference")


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(api, "_logged_choices", set())
    with caplog.at_level(logging.INFO, logger="kernels.attention"):
        for _ in range(3):
            attend()
        attend(implementation="reference")
    assert caplog.messages == [
        "attention implementation: cpu",
        "attention implementation: reference",
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_levels(implementation):
    off = attend(implementation=implementation, statistics="off")
    assert off.statistics is None
    assert torch.equal(off.out_BTHE, attend(implementation=implementation).out_BTHE)
    basic = attend(implementation=implementation).statistics
    assert basic.entropy_BHT is None and basic.null_mass_BHT is None
    full = attend(implementation=implementation, statistics=StatisticsLevel.full).statistics
    assert full.entropy_BHT.shape == (B, H, T)
    for ours, wanted in zip(basic[:5], full[:5], strict=True):
        assert (ours is None and wanted is None) or torch.equal(ours, wanted)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_fp64_inputs_give_fp64_statistics(implementation):
    """fp64 is how everything is checked: a silent cast to fp32 would hide errors of 1e-8."""
    output = sink_attention(
        **inputs(torch.float64),
        mask=packed(),
        null_logit=torch.zeros(H),
        statistics="full",
        implementation=implementation,
    )
    assert all(value.dtype == torch.float64 for value in output.statistics)
    assert output.out_BTHE.dtype == output.lse_BHT.dtype == torch.float64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_and_measuring_change_no_gradient(implementation):
    def gradient(**settings):
        tensors = inputs()
        output = sink_attention(**tensors, mask=packed(), implementation=implementation, **settings)
        for value in output.statistics or ():
            assert value is None or not value.requires_grad
        return torch.autograd.grad(output.out_BTHE.square().sum(), list(tensors.values()))

    plain = gradient(statistics="off")
    for settings in ({"statistics": "full"}, {"key_mass_tap_BHS": zeros_tap()}):
        for ours, wanted in zip(gradient(**settings), plain, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_key_mass_arrives_at_the_tap(implementation):
    expected = attend(implementation=implementation).statistics.key_mass_BHS
    tap = zeros_tap()
    output = attend(implementation=implementation, key_mass_tap_BHS=tap)
    assert output.statistics.key_mass_BHS is None
    assert tap.grad is None
    output.out_BTHE.square().sum().backward()
    assert torch.equal(tap.grad, expected)


# Anomaly detection warns that it is slow.
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("null", [None, "H"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_of_an_empty_row_is_nan(implementation, null):
    """The square of an lse of -inf sends back an infinite gradient; nothing may come of it."""
    tensors = inputs()
    leaves = [*tensors.values()]
    null_logit = torch.zeros(H, requires_grad=True) if null else None
    leaves += [null_logit] if null else []
    with torch.autograd.detect_anomaly():
        output = sink_attention(
            **tensors, mask=packed(), null_logit=null_logit, implementation=implementation
        )
        assert output.lse_BHT.isinf().any()
        loss = output.out_BTHE.sum() + output.lse_BHT.square().sum()
        gradients = torch.autograd.grad(loss, leaves)
    assert gradients[0][1, 7:].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@dataclass
class Batch:
    mask: IntervalMask


def measured_call(batch: Batch, implementation: str, q, k, v, null, tap):
    """A call as part of something larger, with all that it can give."""
    output = sink_attention(
        q * 1.5,
        k,
        v,
        batch.mask.window(6),
        null_logit=null,
        statistics="full",
        key_mass_tap_BHS=tap,
        implementation=implementation,
    )
    return 2 * output.out_BTHE, output.lse_BHT, output.statistics


def results(function, implementation: str) -> list[Tensor]:
    """What such a call gives, and then its gradients; the tap's last."""
    tensors = [*inputs().values(), torch.ones(H, requires_grad=True), zeros_tap()]
    out, lse, statistics = function(Batch(packed()), implementation, *tensors)
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    measured = [value for value in statistics if value is not None]
    assert len(measured) == 5
    return [out, lse, *measured, *torch.autograd.grad(loss, tensors)]


@cache
def plain_results(implementation: str) -> list[Tensor]:
    return results(measured_call, implementation)


# Dynamo instantiates every autograd function that it traces, and PyTorch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "mode",
    [
        "compiled",
        "checkpointed",
        pytest.param("compiled_checkpointed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_and_checkpointed_calls_agree_with_plain_ones(implementation, mode):
    """Checkpointing runs the forward twice: the tap must still be given the key mass once."""

    def checkpointed(*args):
        return checkpoint(measured_call, *args, use_reentrant=False)

    function = checkpointed if "checkpointed" in mode else measured_call
    if "compiled" in mode:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = plain_results(implementation)
    assert plain[-1].sum() > 0
    for ours, wanted in zip(results(function, implementation), plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_no_gradient_is_kept_without_grad():
    with torch.no_grad():
        output = attend()
    assert not output.out_BTHE.requires_grad
    assert torch.equal(output.out_BTHE, attend().out_BTHE)
    assert torch.equal(output.statistics.key_mass_BHS, attend().statistics.key_mass_BHS)


def test_a_hidden_key_is_an_intervention_of_the_reference():
    mask = packed().to_dense()
    visible_BTS = mask.visible_BTS.clone()
    visible_BTS[:, 1:, 0] = False
    hidden = DenseMask(visible_BTS=visible_BTS, document_start_BT=mask.document_start_BT)
    statistics = attend(hidden).statistics
    assert statistics.first_mass_BHT[:, :, 1:].eq(0).all()
    assert statistics.key_mass_BHS[:, :, 0].eq(1).all()


def test_autocast_leaves_the_reference_in_full_precision():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16).bfloat16() for _ in range(3))
    mask = IntervalMask.causal(1, 70)
    plain = sink_attention(q, k, v, mask, statistics="full")
    with torch.autocast("cpu", torch.bfloat16):
        under = sink_attention(q, k, v, mask, statistics="full")
    assert under.lse_BHT.dtype == torch.float32
    torch.testing.assert_close(under.lse_BHT, plain.lse_BHT, rtol=0, atol=0)
    for ours, wanted in zip(under.statistics, plain.statistics, strict=True):
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
