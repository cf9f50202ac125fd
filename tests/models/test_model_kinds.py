"""The contract of every kind of attention, position, norm and feed-forward, known or to come.

A new kind joins by its line in its dict. Attention kinds are run with every position encoding,
norms and feed-forwards, which meet the rest only through the residual stream, with the defaults.

Axes: B rows, T positions, C width, H query heads, G key and value heads, D and E head dims.
"""

import copy
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial

import pytest
import torch
from torch import nn

from kernels.attention import checks
from kernels.errors import UserError
from models.attention import ATTENTIONS, SoftmaxAttention
from models.attention.softmax import Slot
from models.checkpoints import load_model, save_model
from models.decoder import NORMS, NormPlace
from models.feed_forwards import FEED_FORWARDS
from models.positions import POSITIONS, Position

DOCUMENTS = [[1] * 7 + [2] * 5, [1] * 9 + [-1] * 3]
AXES = {
    "attention": ATTENTIONS,
    "position": POSITIONS,
    "norm": NORMS,
    "feed_forward": FEED_FORWARDS,
}
DEFAULTS = {
    "attention": "softmax",
    "position": "rope",
    "norm": "rms_norm",
    "feed_forward": "swiglu",
}
ONE_BY_ONE = [
    DEFAULTS,
    *({axis: name} for axis in AXES for name in AXES[axis] if name != DEFAULTS[axis]),
]
COMBINATIONS = [
    *({"attention": attention, "position": p} for attention in ATTENTIONS for p in POSITIONS),
    *({"norm": name, "norm_place": place} for name in NORMS for place in NormPlace),
    *({"feed_forward": name} for name in FEED_FORWARDS),
]


def switched():
    """Every attention kind under each other value that a bool or enum of its own may take."""
    for name, kind in ATTENTIONS.items():
        for field in fields(kind.Config):
            if isinstance(field.default, bool | Enum):
                values = [False, True] if isinstance(field.default, bool) else type(field.default)
                for value in values:
                    with suppress(UserError):
                        kind.Config(**{field.name: value})
                        if value != field.default:
                            yield {"attention": name, field.name: value}


def is_refused(*, attention="softmax", position="rope", **_):
    """Whether a kind of attention says that it can't take the position encoding's slopes."""
    return POSITIONS[position].has_slopes and not ATTENTIONS[attention].takes_slopes


def decoder_with(decoder_of, *, attention="softmax", **settings):
    kind = ATTENTIONS[attention].Config
    own = {name: settings.pop(name) for name in kind.__dataclass_fields__ if name in settings}
    return decoder_of(attention=kind(**own), **({"num_layers": 2} | settings))


def named(kinds):
    return "-".join(f"{k}={v}" if isinstance(v, bool) else str(v) for k, v in kinds.items())


def check_contract(decoder, batch, folder):
    """What any decoder must do; each line's failure names what is broken."""
    output = decoder(batch)
    assert output.logits_BTV.shape == (2, 12, 97)
    for record in output.layers:
        # Rows of 12 and 9 queries, whose attention goes to keys or to a null slot.
        mass_BH = record.statistics.key_mass_BHS.sum(-1)
        if record.statistics.null_mass_BHT is not None:
            mass_BH = mass_BH + record.statistics.null_mass_BHT.sum(-1)
        queries_BH = torch.tensor([[12.0], [9.0]]).double().expand(2, 4)
        if decoder.alpha_kind == "proxy":
            # A query may weigh no key at all: those that do are counted.
            assert (mass_BH <= queries_BH + 1e-9).all() and (mass_BH >= 1).all()
            queries_BH = mass_BH.round()
        torch.testing.assert_close(mass_BH, queries_BH)

    output.logits_BTV[batch.document_BT > 0].logsumexp(-1).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    save_model(decoder, folder / "model")
    loaded_BTV = load_model(folder / "model")(batch).logits_BTV
    assert torch.equal(loaded_BTV, output.logits_BTV), "a checkpoint doesn't come back"

    batch.tokens_BT[0, 3] = (batch.tokens_BT[0, 3] + 1) % 97
    moved_BT = (decoder(batch).logits_BTV - output.logits_BTV).abs().amax(-1) > 1e-9
    assert not moved_BT[0, :3].any(), "an earlier position saw a later token"
    assert not moved_BT[0, 7:].any(), "another document saw the token"
    assert not moved_BT[1].any(), "another row saw the token"
    saw_T = moved_BT[0, 3:7]
    # Weights that may be 0 hide a token from some.
    saw = saw_T.any() if decoder.alpha_kind == "proxy" else saw_T.all()
    assert saw, "the token's own document didn't see it"


def forced(decoder, implementation):
    """A copy of the decoder whose attention runs on that implementation."""
    decoder = copy.deepcopy(decoder)
    for block in decoder.blocks:
        block.attention.config = replace(block.attention.config, implementation=implementation)
    return decoder


def check_same(ours, wanted, tolerance):
    """Two outputs of a decoder: logits and everything that its layers measured."""
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    close(ours.logits_BTV, wanted.logits_BTV)
    for record, other in zip(ours.layers, wanted.layers, strict=True):
        for value, expected in zip(record.statistics, other.statistics, strict=True):
            assert (value is None) == (expected is None)
            if value is not None:
                close(value, expected)


def check_compiles(decoder, batch):
    torch._dynamo.reset()
    compiled_BTV = torch.compile(decoder, fullgraph=True, backend="eager")(batch).logits_BTV
    torch.testing.assert_close(compiled_BTV, decoder(batch).logits_BTV)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=named)
def test_contract(decoder_of, batch_of, tmp_path, kinds):
    if is_refused(**kinds):
        with pytest.raises(UserError, match=r"model\.position must have no slopes for"):
            decoder_with(decoder_of, **kinds)
        return
    check_contract(decoder_with(decoder_of, **kinds), batch_of(DOCUMENTS), tmp_path)


@pytest.mark.parametrize("kinds", ONE_BY_ONE, ids=named)
def test_measures_what_the_reference_does(decoder_of, batch_of, kinds):
    """On a CPU as it is chosen."""
    decoder, batch = decoder_with(decoder_of, **kinds), batch_of(DOCUMENTS)
    wanted = forced(decoder, "reference")(batch, statistics="full")
    check_same(decoder(batch, statistics="full"), wanted, 1e-9)


# The kernels have fast tests of their own.
@pytest.mark.slow
@pytest.mark.skipif(not checks.INTERPRETED, reason="needs Triton's interpreter")
# The kernels compute what `where` then drops; NumPy warns of it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize(
    "kinds", [kinds for kinds in ONE_BY_ONE if {"attention", "position"} & set(kinds)], ids=named
)
def test_measures_on_triton_what_the_reference_does(decoder_of, batch_of, kinds):
    """In fp32, as Triton's interpreter has it."""
    decoder, batch = decoder_with(decoder_of, **kinds), batch_of(DOCUMENTS)
    wanted = forced(decoder, "reference")(batch, statistics="full")
    triton = forced(decoder, "triton").float()
    check_same(triton(batch, statistics="full"), wanted, 2e-3)


@pytest.mark.parametrize(
    "kinds",
    [
        *ONE_BY_ONE,
        # Of the switches, the one that the compiler once misread is tried every time.
        *(
            kinds if named(kinds) == "gated-values" else pytest.param(kinds, marks=pytest.mark.slow)
            for kinds in switched()
        ),
    ],
    ids=named,
)
def test_compiles_without_a_graph_break(decoder_of, batch_of, kinds):
    check_compiles(decoder_with(decoder_of, num_layers=1, **kinds), batch_of(DOCUMENTS))


def test_models_that_differ_in_a_number_compile_in_one_process(decoder_of, batch_of):
    """From the second on, the compiler takes the number for a variable."""
    torch._dynamo.reset()
    batch = batch_of(DOCUMENTS)
    for bias in (0.0, -2.0, 1.0):
        decoder = decoder_with(decoder_of, num_layers=1, attention="sigmoid", bias=bias)
        compiled_BTV = torch.compile(decoder, fullgraph=True, backend="eager")(batch).logits_BTV
        torch.testing.assert_close(compiled_BTV, decoder(batch).logits_BTV)


def test_attention_kinds_have_configs_of_their_own():
    """A config is what picks its kind, so two kinds can't share one."""
    configs = [kind.Config for kind in ATTENTIONS.values()]
    assert len(set(configs)) == len(configs)


class NewSinkLogit(SoftmaxAttention):
    """A learned logit a head in the softmax's denominator: the ``slot`` hook."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """No settings of its own."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.logit_H = nn.Parameter(torch.zeros(model.num_heads))

    def slot(self, q_BTHD, inputs):
        return Slot(self.logit_H)


class GatedNormedQueries(SoftmaxAttention):
    """Normed queries and keys, gated outputs: the ``project`` and ``finish`` hooks."""

    @dataclass(kw_only=True)
    class Config(SoftmaxAttention.Config):
        """No settings of its own."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.norm = NORMS[model.norm](self.head_dim, model.norm_eps)
        self.gate = nn.Linear(model.d_model, model.num_heads, bias=False)

    def project(self, x_BTC):
        q_BTHD, k_BTGD, v_BTGE = super().project(x_BTC)
        return self.norm(q_BTHD), self.norm(k_BTGD), v_BTGE

    def finish(self, out_BTHE, x_BTC):
        return out_BTHE * self.gate(x_BTC).sigmoid()[..., None]


class NewLearned(Position):
    """Learned positions: the ``embed`` hook."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(16, config.d_model)

    def embed(self, x_BTC, positions_BT):
        return x_BTC + self.table(positions_BT)


class NewSlopes(Position):
    """ALiBi: the ``slopes`` hook."""

    def __init__(self, config):
        super().__init__(config)
        self.num_heads = config.num_heads

    def slopes(self, device):
        return 2.0 ** -torch.arange(1, self.num_heads + 1, dtype=torch.float64, device=device)


@pytest.mark.parametrize(
    "kind",
    [NewSinkLogit, GatedNormedQueries, NewLearned, NewSlopes],
    ids=lambda kind: kind.__name__,
)
def test_a_new_kind_is_a_class_and_a_line(decoder_of, batch_of, tmp_path, monkeypatch, kind):
    is_position = issubclass(kind, Position)
    monkeypatch.setitem(POSITIONS if is_position else ATTENTIONS, "new", kind)
    axis = "position" if is_position else "attention"
    decoder = decoder_with(decoder_of, **{"position": "none", axis: "new"})
    plain = decoder_with(decoder_of, position="none")
    # With the plain decoder's weights, only what the kind adds can tell the two apart.
    decoder.load_state_dict(plain.state_dict(), strict=False)
    batch = batch_of(DOCUMENTS)
    assert (decoder(batch).logits_BTV - plain(batch).logits_BTV).abs().max() > 1e-3
    check_contract(decoder, batch, tmp_path)
    check_compiles(decoder, batch_of(DOCUMENTS))
