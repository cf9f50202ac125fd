"""Interventions on a planted sink: what sees itself alone in block 0 gets a marker, and the heads
of blocks 1 and 2 rest on markers.
"""

import math

import pytest
import torch

from kernels.errors import UserError
from models.attention import ATTENTIONS, SoftmaxAttention
from models.decoder import Decoder, DecoderConfig, NormPlace
from tests.train.handmade import (
    LENGTH,
    MARKER,
    blank_decoder,
    inputs_of,
    planted_sink,
    shifted_tokens,
    shuffled_tokens,
    value,
    values,
)
from train.probes.circuit import probe_circuit
from train.probes.interventions import fate_shares, probe_interventions
from train.probes.mixing import probe_mixing


def harmonic(n):
    return sum(1 / k for k in range(1, n + 1))


UNIFORM = harmonic(16) / 16


@pytest.fixture(scope="module")
def found():
    return list(probe_interventions(planted_sink(), inputs_of(text=shifted_tokens())))


def near(expected):
    return pytest.approx(expected, abs=1e-6)


def fates(found, kind):
    """The three shares by layer of the intervention."""
    names = ("stayed", "moved", "died")
    shares = [values(found, f"{kind}_{name}_share") for name in names]
    return [dict(zip(names, share, strict=True)) for share in zip(*shares, strict=True)]


def test_unmodified_position_0_is_the_sink(found):
    by_layer = [value(found, "baseline_alpha", position=0, layer=x) for x in range(3)]
    assert by_layer == near([UNIFORM, 1, 1])
    mean = value(found, "baseline_alpha", position=0, layer=-1)
    assert mean == near((UNIFORM + 2) / 3)
    # 1 / 9, ..., 1 / 16 of the queries from 8 on, in block 0.
    mean = value(found, "baseline_alpha", position=8, layer=-1)
    assert mean == near((harmonic(16) - harmonic(8)) / 8 / 3)
    assert value(found, "baseline_best_alpha", layer=-1) == near((UNIFORM + 2) / 3)
    assert values(found, "baseline_best_position") == [0] * 4
    ratio = value(found, "baseline_norm_ratio", position=0)
    assert ratio == near(((3 + MARKER**2) / (2 + 1 / 9)) ** 0.5)
    assert not [f for f in found if "slot" in f.name]


@pytest.mark.parametrize("kind, layer", [("self_only_one_block", 0), ("self_only", 0)])
def test_a_position_that_sees_itself_alone_becomes_a_sink_too(found, kind, layer):
    """It shares the later queries with position 0."""
    first = value(found, f"{kind}_alpha", layer=layer, position=0)
    assert first == near((UNIFORM - 1 / 9 / 16 + 2 * (8 + 4) / 16) / 3)
    own = value(found, f"{kind}_alpha", layer=layer, position=8)
    in_block_0 = (1 + harmonic(16) - harmonic(9)) / 8
    assert own == near((in_block_0 + 2 / 2) / 3)
    ratio = value(found, f"{kind}_norm_ratio", layer=layer, position=8)
    # The median of the others is position 7's now.
    assert ratio == near(((3 + MARKER**2) / (2 + 1 / 8)) ** 0.5)
    neighbours = [value(found, f"{kind}_alpha", layer=layer, position=x) for x in (1, 2, 3)]
    in_block_0 = [(harmonic(16) - harmonic(x) - 1 / 9) / (16 - x) for x in (1, 2, 3)]
    assert neighbours == near([x / 3 for x in in_block_0])
    # 3/4 of the queries of blocks 1 and 2 go to it still.
    assert fates(found, kind)[layer] == {"stayed": 1, "moved": 0, "died": 0}


def test_from_block_0_on_it_keeps_its_own_query_too(found):
    own = value(found, "self_only_alpha", layer=2, position=8)
    in_block_0 = (1 + harmonic(16) - harmonic(9)) / 8
    assert own == near((in_block_0 + 2 * (1 + 7 / 2) / 8) / 3)


def test_seeing_itself_alone_after_the_marker_is_written_makes_no_sink(found):
    own = value(found, "self_only_one_block_alpha", layer=1, position=8)
    assert own == near(((harmonic(16) - harmonic(8)) / 8 + 1 / 8) / 3)
    ratio = value(found, "self_only_one_block_norm_ratio", layer=1, position=8)
    assert ratio == near(value(found, "baseline_norm_ratio", position=8))


def test_hidden_position_0_hands_the_sink_to_position_1(found):
    by_layer = [value(found, "hidden_first_alpha", layer=x, position=1) for x in range(3)]
    assert by_layer == near([harmonic(15) / 15, 1, 1])
    alphas = values(found, "hidden_first_alpha", layer=-1)
    assert alphas[0] == near(1 / 16)
    assert alphas[1] == near((harmonic(15) / 15 + 2) / 3)
    assert alphas[2] == near((harmonic(15) - 1) / 14 / 3)
    assert value(found, "baseline_alpha", position=1, layer=1) == near(0)
    assert values(found, "hidden_first_best_position") == [1] * 4
    assert value(found, "hidden_first_best_alpha", layer=-1) == alphas[1]
    assert fates(found, "hidden_first") == [{"stayed": 0, "moved": 1, "died": 0}]
    assert value(found, "hidden_first_norm_ratio", position=1) > 4


def test_a_hidden_ordinary_key_changes_little(found):
    in_block_0 = (harmonic(9) + harmonic(15) - harmonic(8)) / 16
    by_layer = [value(found, "hidden_other_alpha", layer=x, position=0) for x in range(3)]
    assert by_layer == near([in_block_0, 1, 1])
    # Its own query is left in block 0.
    assert value(found, "hidden_other_alpha", layer=-1, position=8) == near(1 / 9 / 8 / 3)
    assert fates(found, "hidden_other") == [{"stayed": 1, "moved": 0, "died": 0}]


def test_the_sink_dies_with_the_feed_forward_that_marks_it(found):
    """Only the feed-forward of block 0 at position 0 is one."""
    alphas = values(found, "zeroed_ffn_first_alpha", position=0)
    baseline = (UNIFORM + 2) / 3
    assert alphas == near([UNIFORM, baseline, baseline])
    assert values(found, "zeroed_ffn_first_best_alpha") == alphas
    assert value(found, "zeroed_ffn_first_alpha", position=1, layer=0) == near(
        (harmonic(16) - 1) / 15
    )
    assert values(found, "zeroed_ffn_other_alpha", position=0) == near([baseline] * 3)
    dead, *alive = values(found, "zeroed_ffn_first_norm_ratio", position=0)
    assert dead == near((3 / (2 + 1 / 9)) ** 0.5)
    assert alive == near([value(found, "baseline_norm_ratio", position=0)] * 2)
    stays, dies = ({"stayed": x, "moved": 0, "died": 1 - x} for x in (1, 0))
    assert fates(found, "zeroed_ffn_first") == [dies, stays, stays]
    assert fates(found, "zeroed_ffn_other") == [stays] * 3
    assert not [f for f in found if f.name.startswith("baseline") and f.name.endswith("share")]


def test_a_sink_that_has_a_second_choice_moves_there():
    """Position 1 has a third of the marker: e^(20/3) to 1 of every other key once 0 has none."""
    found = list(probe_interventions(planted_sink(least=0.4), inputs_of(text=shifted_tokens())))
    assert value(found, "baseline_best_position", layer=-1) == 0
    weight = math.exp(20 / 3)
    later = sum(weight / (weight + n - 1) for n in range(2, 17)) / 15
    moved = value(found, "zeroed_ffn_first_alpha", layer=0, position=1)
    assert moved == near(((harmonic(16) - 1) / 15 + 2 * later) / 3)
    assert values(found, "zeroed_ffn_first_best_alpha")[0] == near(moved)
    assert values(found, "zeroed_ffn_first_best_position") == [1, 0, 0]
    fate, *_ = fates(found, "zeroed_ffn_first")
    assert fate == {"stayed": 0, "moved": 1, "died": 0}


def test_shares_are_of_the_samples_whose_first_key_was_a_sink():
    """Four samples of one head: no sink before, then one of each fate."""
    before = [[0.3, 0.9, 0, 0], [0.4, 0, 0, 0], [0.31, 0.5, 0, 0], [1, 0, 0, 0]]
    after = [[0.9, 0, 0, 0], [0.4, 0.9, 0, 0], [0.3, 0.4, 0, 0], [0, 0.3, 0.9, 1]]
    before_LBHS, after_LBHS = (
        torch.tensor([x], dtype=torch.float64)[:, :, None] for x in (before, after)
    )
    shares = fate_shares(before_LBHS, after_LBHS)
    assert shares == {fate: near(1 / 3) for fate in ("stayed", "moved", "died")}
    assert fate_shares(before_LBHS[:, :1], after_LBHS[:, :1]) == {}


@pytest.mark.parametrize("position", [1, 3, 5, 15])
def test_another_position_can_be_chosen(position):
    inputs = inputs_of(text=shifted_tokens())
    found = list(probe_interventions(planted_sink(), inputs, position=position))
    shown = {f.position for f in found if f.name == "self_only_alpha"}
    assert shown == {0, 1, 2, 3, position}
    first = value(found, "self_only_one_block_alpha", layer=0, position=0)
    lost = (16 - position) / 2
    in_block_0 = harmonic(16) - 1 / (position + 1)
    assert first == near((in_block_0 + 2 * (16 - lost)) / 16 / 3)
    places = [f[:2] + f[3:] for f in found]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("position", [0, -1, 16, 2.0])
def test_a_position_that_is_none_is_the_users_mistake(position):
    with pytest.raises(UserError, match="position must be between 1 and 15, got"):
        list(probe_interventions(blank_decoder(), inputs_of(text=shifted_tokens()), position))


def test_a_slot_gets_its_share_of_what_is_hidden():
    """Uniform off-by-one attention: 1 / (n + 1) to the slot for a query that sees n keys."""
    decoder = blank_decoder(attention=ATTENTIONS["off_by_one"].Config())
    found = list(probe_interventions(decoder, inputs_of(text=shifted_tokens())))
    assert value(found, "baseline_slot_mass") == near((harmonic(17) - 1) / 16)
    assert value(found, "hidden_first_slot_mass") == near((1 / 2 + harmonic(16) - 1) / 16)
    lost = (harmonic(16) - harmonic(9)) - (harmonic(17) - harmonic(10))
    baseline = value(found, "baseline_slot_mass")
    assert value(found, "hidden_other_slot_mass") == near(baseline + lost / 16)
    one_block = value(found, "self_only_one_block_slot_mass", layer=0)
    assert one_block == near(baseline + (1 / 2 - 1 / 10) / 16 / 3)
    assert not [f for f in found if f.name.endswith("_share")]


def test_natural_prompts_are_what_is_changed():
    text_BT = shifted_tokens()
    bos_text_BT = torch.cat([torch.zeros(LENGTH, 1, dtype=torch.int64), text_BT[:, :-1]], 1)
    for trained, name in ((True, "bos_text"), (False, "text")):
        inputs = inputs_of(trained_with_bos=trained, text=text_BT, bos_text=bos_text_BT)
        found = probe_interventions(blank_decoder(), inputs)
        assert {f.input for f in found} == {name}


VARIANTS = {
    **{name: {"attention": kind.Config()} for name, kind in ATTENTIONS.items()},
    "window": {"attention": SoftmaxAttention.Config(window=3, global_every=2)},
    "alibi": {"position": "alibi"},
    "post_norm": {"norm_place": NormPlace.after},
    "both_norms": {"norm_place": NormPlace.both, "norm": "layer_norm"},
    "one_layer": {"num_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_decoder_can_be_probed_again_with_the_same_findings(variant):
    settings = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 12}
    settings = settings | VARIANTS[variant]
    attention = settings.pop("attention", SoftmaxAttention.Config())
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**settings), attention, LENGTH).eval()
    text_BT = shifted_tokens(4)
    bos_text_BT = torch.cat([torch.zeros(4, 1, dtype=torch.int64), text_BT[:, :-1]], 1)
    tokens_BT = {"text": text_BT, "bos_text": bos_text_BT, "random": shuffled_tokens(4)}
    inputs = inputs_of(trained_with_bos=True, **tokens_BT)
    for probe in (probe_mixing, probe_circuit, probe_interventions):
        findings = list(probe(decoder, inputs))
        assert all(type(f.value) is float and math.isfinite(f.value) for f in findings)
        places = [f[:2] + f[3:] for f in findings]
        assert len(set(places)) == len(places) > 0
        # The metrics of a run tell a model's value from a position's by name.
        with_position = {f.name for f in findings if f.position >= 0}
        assert not with_position & {f.name for f in findings if f.position < 0}
        assert {f.head for f in findings} == {-1}
        assert findings == list(probe(decoder, inputs))
    assert all(parameter.grad is None for parameter in decoder.parameters())
