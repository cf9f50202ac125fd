"""Interventions on a planted sink: what sees itself alone in block 0 gets a marker, and the heads
of blocks 1 and 2 rest on markers.
"""

import math

import pytest
import torch

from models.attention import ATTENTIONS, SoftmaxAttention
from models.decoder import Decoder, DecoderConfig, NormPlace
from tests.train.handmade import (
    LENGTH,
    MARKER,
    blank_decoder,
    inputs_of,
    planted_sink,
    shifted_tokens,
    value,
    values,
)
from train.probes.circuit import probe_circuit
from train.probes.interventions import probe_interventions
from train.probes.mixing import probe_mixing


def harmonic(n):
    return sum(1 / k for k in range(1, n + 1))


UNIFORM = harmonic(16) / 16


@pytest.fixture(scope="module")
def found():
    return list(probe_interventions(planted_sink(), inputs_of(text=shifted_tokens())))


def near(expected):
    return pytest.approx(expected, abs=1e-6)


def test_unmodified_position_0_is_the_sink(found):
    by_layer = [value(found, "baseline_alpha", position=0, layer=x) for x in range(3)]
    assert by_layer == near([UNIFORM, 1, 1])
    mean = value(found, "baseline_alpha", position=0, layer=-1)
    assert mean == near((UNIFORM + 2) / 3)
    # 1 / 9, ..., 1 / 16 of the queries from 8 on, in block 0.
    mean = value(found, "baseline_alpha", position=8, layer=-1)
    assert mean == near((harmonic(16) - harmonic(8)) / 8 / 3)
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
    by_layer = [value(found, "hidden_first_next_alpha", layer=x) for x in range(3)]
    assert by_layer == near([harmonic(15) / 15, 1, 1])
    alphas = values(found, "hidden_first_alpha")
    assert alphas[0] == near(1 / 16)
    assert alphas[1] == near((harmonic(15) / 15 + 2) / 3)
    assert alphas[2] == near((harmonic(15) - 1) / 14 / 3)
    assert value(found, "baseline_alpha", position=1, layer=1) == near(0)


def test_the_sink_dies_with_the_feed_forward_that_marks_it(found):
    alphas = values(found, "zeroed_ffn_first_alpha", position=0)
    baseline = (UNIFORM + 2) / 3
    assert alphas == near([UNIFORM, baseline, baseline])
    assert values(found, "zeroed_ffn_first_alpha", position=8) == near([baseline] * 3)
    dead, *alive = values(found, "zeroed_ffn_norm_ratio", position=0)
    assert dead == near((3 / (2 + 1 / 9)) ** 0.5)
    assert alive == near([value(found, "baseline_norm_ratio", position=0)] * 2)


def test_a_slot_gets_its_share_of_what_is_hidden():
    """Uniform off-by-one attention: 1 / (n + 1) to the slot for a query that sees n keys."""
    decoder = blank_decoder(attention=ATTENTIONS["off_by_one"].Config())
    found = list(probe_interventions(decoder, inputs_of(text=shifted_tokens())))
    assert value(found, "baseline_slot_mass") == near((harmonic(17) - 1) / 16)
    assert value(found, "hidden_first_slot_mass") == near((1 / 2 + harmonic(16) - 1) / 16)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_decoder_can_be_probed_again_with_the_same_findings(variant):
    settings = {"num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 12}
    settings = settings | VARIANTS[variant]
    attention = settings.pop("attention", SoftmaxAttention.Config())
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**settings), attention, LENGTH).eval()
    text_BT = shifted_tokens(4)
    bos_text_BT = torch.cat([torch.zeros(4, 1, dtype=torch.int64), text_BT[:, :-1]], 1)
    inputs = inputs_of(trained_with_bos=True, text=text_BT, bos_text=bos_text_BT)
    for probe in (probe_mixing, probe_circuit, probe_interventions):
        findings = list(probe(decoder, inputs))
        assert all(type(f.value) is float and math.isfinite(f.value) for f in findings)
        places = [f[:2] + f[3:] for f in findings]
        assert len(set(places)) == len(places) > 0
        assert findings == list(probe(decoder, inputs))
    assert all(parameter.grad is None for parameter in decoder.parameters())
