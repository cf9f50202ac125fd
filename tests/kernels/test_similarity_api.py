"""What a caller of ``similarity_attention`` relies on: choice, errors, taps, extremes, compile."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import checks
from kernels.errors import UserError
from kernels.masks import IntervalMask
from kernels.similarity import Normalize, Similarity, api, similarity_attention
from tests.kernels.refusals import check_refusals
from tests.kernels.similarity_runs import KINDS

# Triton's interpreter computes what `where` then drops; NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

B, T, H, G, D, E = 2, 9, 4, 2, 8, 4
INTERPRETED = pytest.mark.skipif(
    not (checks.HAS_TRITON and checks.INTERPRETED), reason="needs Triton's interpreter"
)
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=INTERPRETED)]


def inputs(**changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q_BTHD": (B, T, H, D), "k_BTGD": (B, T, G, D), "v_BTGE": (B, T, G, E), **changes}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def packed() -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor([[1] * 4 + [2] * 5, [1] * 7 + [-1] * 2]))


def attend(mask=None, **settings):
    settings = {"similarity": "sigmoid", "normalize": "none", **settings}
    return similarity_attention(**inputs(), mask=packed() if mask is None else mask, **settings)


WRONG = {
    "similarity": (
        {"similarity": "tanh"},
        "attention.similarity must be one of identity, sigmoid, elu, softpick, got 'tanh'",
    ),
    "normalize": (
        {"normalize": "max"},
        "attention.normalize must be one of none, sum, clamped_sum, got 'max'",
    ),
    "softpick": (
        {"similarity": "softpick"},
        "attention.normalize must be sum for softpick, got 'none'",
    ),
    "clamped": (
        {"normalize": Normalize.clamped_sum, "similarity": Similarity.elu},
        "attention.normalize must be none or sum for elu, got 'clamped_sum'",
    ),
    "q": ({"q_BTHD": torch.zeros(2, 3, 4)}, "attention.q must be [B, T, heads, D], got (2, 3, 4)"),
    "heads": (
        {"q_BTHD": torch.zeros(B, T, 5, D)},
        "attention.k must have a number of heads that divides q's 5, got 2",
    ),
    "dtype": (
        {"k_BTGD": torch.zeros(B, T, G, D).double()},
        "attention.k must be torch.float32, got torch.float64",
    ),
    "mask": (
        {"mask": IntervalMask.causal(B, 8)},
        "attention.mask must be of 2 rows of 9 tokens, as q [B, T, H, D] is, got (2, 8)",
    ),
    "slopes": (
        {"slopes_H": torch.zeros(3)},
        "attention.slopes must have shape (4,), got (3,)",
    ),
    "bias": ({"bias": float("inf")}, "attention.bias must be a finite number of fp32, got inf"),
    "tap": (
        {"key_mass_tap_BHS": torch.zeros(B, H, 8)},
        "attention.key_mass_tap must have shape (2, 4, 9), got (2, 4, 8)",
    ),
    "tap_off": (
        {"key_mass_tap_BHS": torch.zeros(B, H, T, requires_grad=True), "statistics": "off"},
        "statistics must be basic or full where a key mass tap is passed, got 'off'",
    ),
    "level": (
        {"statistics": "some"},
        "statistics must be one of off, basic, full, got 'some'",
    ),
    "implementation": (
        {"implementation": "cpu"},
        "attention.implementation must be one of auto, reference, triton, got 'cpu'",
    ),
    "triton_dense": (
        {"implementation": "triton", "mask": packed().to_dense()},
        "attention.implementation triton can't run a dense mask; use reference",
    ),
    "triton_slopes": (
        {"implementation": "triton", "slopes_H": torch.zeros(H, requires_grad=True)},
        "attention.implementation triton can't run slopes that need a gradient; use reference",
    ),
    "triton_head_dim": (
        {"implementation": "triton", "v_BTGE": torch.zeros(B, T, G, 10)},
        "attention.implementation triton can't run head dim 10 (only multiples of 4 up to 256); "
        "use reference",
    ),
    "triton_programs": (
        {
            "implementation": "triton",
            "q_BTHD": torch.zeros(2**15, 1, 2, 8),
            "k_BTGD": torch.zeros(2**15, 1, 2, 8),
            "v_BTGE": torch.zeros(2**15, 1, 2, 8),
            "mask": IntervalMask.causal(2**15, 1),
        },
        "attention.implementation triton can't run 65536 rows x heads (at most 65535); "
        "use reference",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_named_in_one_line(wrong, monkeypatch):
    # Elsewhere the machine, or tensors on its CPU, would be what is refused.
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", True)
    settings, message = WRONG[wrong]
    usual = {**inputs(), "mask": packed(), "similarity": "sigmoid", "normalize": "none"}
    with pytest.raises(UserError) as caught:
        similarity_attention(**{**usual, **settings})
    assert str(caught.value) == message


def test_triton_names_what_it_lacks(monkeypatch):
    def call(dtype: torch.dtype) -> None:
        tensors = {name: x.to(dtype) for name, x in inputs().items()}
        kind = {"similarity": "elu", "normalize": "sum"}
        similarity_attention(**tensors, mask=packed(), implementation="triton", **kind)

    check_refusals(monkeypatch, call)


def test_auto_takes_the_reference_on_a_cpu(caplog, monkeypatch):
    monkeypatch.setattr(api, "_logged_choices", set())
    with caplog.at_level("INFO", logger="kernels.similarity"):
        assert all(attend().probabilities_BHTS is not None for _ in range(2))
    assert caplog.messages == ["similarity attention implementation: reference"]
    assert attend(packed().to_dense()).probabilities_BHTS is not None


def test_auto_takes_triton_on_a_gpu_where_it_can(monkeypatch):
    """Asked of the choice alone, so that machines without a GPU can."""
    monkeypatch.setattr(checks, "HAS_TRITON", True)
    monkeypatch.setattr(checks, "INTERPRETED", False)
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(B, T, H, 64))
    x.element_size = lambda: 2
    assert api._choose("auto", x, x, packed(), None) == "triton"
    assert api._choose("auto", x, x, packed().to_dense(), None) == "reference"
    x.dtype = torch.float64
    assert api._choose("auto", x, x, packed(), None) == "reference"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids="-".join)
def test_statistics_and_measuring_change_no_result(kind, implementation):
    def results(**settings):
        tensors = inputs()
        kinds = {"similarity": kind[0], "normalize": kind[1], "implementation": implementation}
        output = similarity_attention(**tensors, mask=packed(), **kinds, **settings)
        gradients = torch.autograd.grad(output.out_BTHE.square().sum(), list(tensors.values()))
        return [output.out_BTHE, output.row_abs_sum_BHT, *gradients], output.statistics

    exact, statistics = results(statistics="off")
    assert statistics is None
    tap = torch.zeros(B, H, T, requires_grad=True)
    for settings in ({"statistics": "full"}, {"key_mass_tap_BHS": tap}):
        ours, statistics = results(**settings)
        assert statistics.null_mass_BHT is None
        assert (statistics.entropy_BHT is None) == ("statistics" not in settings)
        for value, wanted in zip(ours, exact, strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_key_mass_arrives_at_the_tap_once(implementation):
    expected = attend(implementation=implementation).statistics.key_mass_BHS
    for through in (lambda f, *args: f(*args), checkpoint):
        tap = torch.zeros(B, H, T, requires_grad=True)

        def call(tap):
            output = attend(implementation=implementation, key_mass_tap_BHS=tap)
            assert output.statistics.key_mass_BHS is None
            return output.out_BTHE

        settings = {"use_reentrant": False} if through is checkpoint else {}
        through(call, tap, **settings).square().sum().backward()
        torch.testing.assert_close(tap.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_compiled_call_agrees_with_a_plain_one(implementation):
    def call(q, k, v, tap):
        output = similarity_attention(
            q * 1.5,
            k,
            v,
            packed(),
            similarity="softpick",
            normalize="sum",
            statistics="full",
            key_mass_tap_BHS=tap,
            implementation=implementation,
        )
        return 2 * output.out_BTHE, output.row_abs_sum_BHT, output.statistics

    mask = packed()
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Compiled code takes the mask as it is.
        monkeypatch.setitem(globals(), "packed", lambda: mask)
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            tensors = [*inputs().values(), torch.zeros(B, H, T, requires_grad=True)]
            out, row_abs_sum, statistics = function(*tensors)
            gradients = torch.autograd.grad(out.square().sum(), tensors)
            measured = [x for x in statistics if x is not None]
            results.append([out, row_abs_sum, *measured, *gradients])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


# Anomaly detection warns that it is slow.
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_extreme_scores_and_sums_of_zero_are_no_nan(kind, score, implementation):
    """e^200 is no number of fp32, e^-200 is 0 there: as is what a sum of it divides."""
    q = torch.full((2, 9, 1, 4), score / 4, requires_grad=True)
    k, v = (torch.ones(2, 9, 1, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.detect_anomaly():
        output = similarity_attention(
            q,
            k,
            v,
            packed(),
            similarity=kind[0],
            normalize=kind[1],
            scale=1.0,
            statistics="full",
            implementation=implementation,
        )
        gradients = torch.autograd.grad(output.out_BTHE.sum(), [q, k, v])
    statistics = output.statistics
    measured = [statistics.first_mass_BHT, statistics.key_mass_BHS, statistics.entropy_BHT]
    for x in (output.out_BTHE, output.row_abs_sum_BHT, *measured, *gradients):
        assert x.isfinite().all()
    seen_BT = packed().keys_per_query_BT() > 0
    # Sigmoid and elu of -200 are below the smallest sum in fp32 and in fp64; softpick gives 0.
    has_weights = score > 0 or (score == 0 and kind[0] in ("sigmoid", "elu"))
    has_weights |= score < 0 and kind[0] == "identity"
    weighted_BT = seen_BT & has_weights
    assert torch.equal(statistics.key_mass_BHS.sum(-1)[:, 0].round(), weighted_BT.sum(-1).float())
    if kind[1] == "sum":
        # Every value is 1, so out is the sum of the weights.
        wanted = weighted_BT[..., None, None].expand_as(output.out_BTHE).float()
        torch.testing.assert_close(output.out_BTHE, wanted)
    for x in (output.out_BTHE[1, 7:], gradients[0][1, 7:], output.row_abs_sum_BHT[1, :, 7:]):
        assert x.eq(0).all()
    top = torch.tensor(score)
    torch.testing.assert_close(statistics.max_logit_BH, top.expand(2, 1))


@INTERPRETED
def test_an_empty_batch_gives_empty_results():
    q, k, v = (torch.zeros(0, 24, 2, 16, requires_grad=True) for _ in range(3))
    ends_BT = torch.zeros(0, 24, dtype=torch.int32)
    mask = IntervalMask(start_BT=ends_BT, stop_BT=ends_BT, document_start_BT=ends_BT)
    kind = {"similarity": "elu", "normalize": "sum", "statistics": "full"}
    output = similarity_attention(q, k, v, mask, implementation="triton", **kind)
    assert output.statistics.key_mass_BHS.shape == (0, 2, 24)
    output.out_BTHE.sum().backward()
    assert q.grad.shape == q.shape


def operator_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 2, 8), (1, 6, 1, 8), (1, 6, 1, 4)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    mask = IntervalMask.causal(1, 6)
    return leaves, (mask.start_BT, mask.stop_BT), (0, True)


@INTERPRETED
@pytest.mark.parametrize(
    ("kind", "tap", "level"),
    [(("softpick", "sum"), True, "full"), (("sigmoid", "none"), False, "off")],
    ids=["softpick-full-tap", "sigmoid-off"],
)
def test_the_operators_pass_pytorchs_own_checks(kind, tap, level):
    operators = torch.ops.sinklab
    leaves, intervals, how = operator_inputs()
    tap = torch.zeros(1, 2, 6, requires_grad=True) if tap else None
    where = (None, *intervals, torch.zeros_like(intervals[0]), *how, True, 0.3, 0.5, *kind, level)
    torch.library.opcheck(operators.similarity.default, (*leaves, tap, *where))
    qkv = [x.detach() for x in leaves]
    out, abs_sum, norm, *_ = operators.similarity(*qkv, None, *where)
    backward = (out, *qkv, out, abs_sum, norm, None, *intervals, *how, 0.3, 0.5, *kind, level)
    torch.library.opcheck(operators.similarity_backward.default, backward)
    arguments = (*qkv[:2], abs_sum, norm, None, *intervals, *how, 0.3, 0.5, kind[0])
    torch.library.opcheck(operators.similarity_key_mass.default, arguments)


@INTERPRETED
def test_products_are_counted():
    leaves, intervals, how = operator_inputs()
    operators = torch.ops.sinklab
    where = (None, None, *intervals, torch.zeros_like(intervals[0]), *how, True, 0.3, 0.0)
    with FlopCounterMode(display=False) as counter:
        out, abs_sum, norm, *_ = operators.similarity(*leaves, *where, "elu", "sum", "basic")
        out.sum().backward()
        operators.similarity_key_mass(
            *leaves[:2], abs_sum, norm, None, *intervals, *how, 0.3, 0.0, "elu"
        )
    pairs, D, E = 2 * 6 * 6, 8, 4
    assert counter.get_flop_counts()["Global"] == {
        operators.similarity: 2 * pairs * (D + E),
        operators.similarity_backward: 2 * pairs * (3 * D + 2 * E),
        operators.similarity_key_mass: 2 * pairs * D,
    }
