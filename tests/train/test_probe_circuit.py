"""The circuit on a planted one, whose norms and angles are known.

A state of ``planted_sink`` has squared norm 2 (its id, the 1), 1 / (i + 1) after the attention of
the writing block (the mean of i + 1 ids), and MARKER^2 at position 0 after its feed-forward. The
median of the others, of 15, is that of position 8.
"""

import pytest
import torch

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
from tests.train.test_probe_trace import decoder_of
from train.probes.circuit import probe_circuit, separability

MEDIAN = 2 + 1 / 9
ATTENDED = (3 / MEDIAN) ** 0.5
PEAK = ((3 + MARKER**2) / MEDIAN) ** 0.5


def probed(decoder, **tokens_BT):
    return list(probe_circuit(decoder, inputs_of(**tokens_BT)))


@pytest.mark.parametrize("writer, share", [(0, 1), (1, 1), (2, 0)])
def test_the_jump_is_where_it_is_planted(writer, share):
    found = probed(planted_sink(writer), text=shifted_tokens())
    before = [1] * writer
    after = [PEAK] * (2 - writer)
    assert values(found, "norm_ratio_embedding") == pytest.approx([1])
    attention = [*before, ATTENDED, *after]
    assert values(found, "norm_ratio_after_attention") == pytest.approx(attention)
    ends = [*before, PEAK, *after]
    assert values(found, "norm_ratio_after_feed_forward") == pytest.approx(ends)
    jumps = values(found, "norm_jump_attention"), values(found, "norm_jump_feed_forward")
    assert jumps[0][writer] == pytest.approx(ATTENDED - 1)
    assert jumps[1][writer] == pytest.approx(PEAK - ATTENDED)
    assert sum(map(sum, jumps)) == pytest.approx(PEAK - 1)
    assert value(found, "norm_jump") == pytest.approx(PEAK - 1)
    assert value(found, "norm_jump_share_of_first_two") == pytest.approx(share)


def test_a_model_without_a_jump_has_no_share_of_it():
    decoder = planted_sink()
    torch.nn.init.zeros_(decoder.blocks[0].attention.output.weight)
    found = probed(decoder, text=shifted_tokens())
    assert value(found, "norm_jump") == pytest.approx(0)
    assert not [f for f in found if f.name == "norm_jump_share_of_first_two"]


def test_the_marker_separates_position_0_and_the_token_does_not():
    found = probed(planted_sink(writer=1), text=shuffled_tokens(64))
    assert 0.35 < value(found, "separability_embedding") < 0.65
    assert 0.35 < value(found, "separability_after_feed_forward", layer=0) < 0.65
    assert values(found, "separability_after_feed_forward")[1:] == [1, 1]


def test_random_tokens_tell_position_from_what_documents_begin_with():
    """Text begins with id 0 or 1 and holds them nowhere else: no block is needed."""
    later_BT = shuffled_tokens(64) % (LENGTH - 2) + 2
    text_BT = torch.cat([torch.arange(64)[:, None] // 2 % 2, later_BT[:, 1:]], 1)
    tokens_BT = {"text": text_BT, "random": shuffled_tokens(64)}
    blank, planted = (probed(d, **tokens_BT) for d in (blank_decoder(), planted_sink(writer=1)))
    for place in ("embedding", "after_attention", "after_feed_forward"):
        kind = f"separability_{place}"
        assert set(values(blank, kind, input="text")) == {1}
        assert all(0.35 < x < 0.65 for x in values(blank, kind, input="random"))
    assert values(planted, "separability_after_feed_forward", input="random")[1:] == [1, 1]
    # Stability and norms come with it.
    of_text, of_random = ({f[:1] + f[3:] for f in planted if f.input == x} for x in tokens_BT)
    assert of_text == of_random


def test_stability_is_the_cosine_of_first_states():
    """Different ids share the 1 of the 2 or 3 that their squared norm is, and the marker."""
    found = probed(planted_sink(), text=shifted_tokens())
    assert value(found, "stability_embedding", position=0) == pytest.approx(1 / 2)
    attended = value(found, "stability_after_attention", position=0, layer=0)
    assert attended == pytest.approx(1 / 3)
    marked = values(found, "stability_after_feed_forward", position=0)
    assert marked == pytest.approx([(1 + MARKER**2) / (3 + MARKER**2)] * 3)
    assert max(values(found, "stability_after_feed_forward", position=8)) < 0.9


def test_a_bos_has_no_stability_but_a_place():
    """It would be 1 in any model."""
    text_BT = shifted_tokens()
    bos_text_BT = torch.cat([torch.zeros(LENGTH, 1, dtype=torch.int64), text_BT[:, :-1]], 1)
    found = probed(planted_sink(), text=text_BT, bos_text=bos_text_BT, repeated=text_BT)
    names = {f.name for f in found if f.input == "bos_text"}
    assert {f.name for f in found if f.input == "text"} - names == {
        "stability_embedding",
        "stability_after_attention",
        "stability_after_feed_forward",
    }
    assert {f.input for f in found} == {"text", "bos_text"}
    # The id of the BOS is one of the text's too.
    assert 0.95 < value(found, "separability_embedding", input="bos_text") < 1


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_linear_probe_needs_no_scale(scale):
    """One of 40 directions separates, 100 times fainter than the largest of the others."""
    torch.manual_seed(0)
    hidden_BTC = torch.randn(60, 16, 40, dtype=torch.float64)
    assert 0.4 < separability(hidden_BTC * scale) < 0.6
    hidden_BTC[..., 0] *= 0.1
    hidden_BTC[:, 0, 0] += 1
    hidden_BTC[..., 1] *= 100
    assert separability(hidden_BTC * scale) > 0.95


def test_a_linear_probe_of_one_point_is_chance():
    assert separability(torch.ones(4, 16, 8)) == 0.5
    assert separability(torch.ones(1, 16, 8)) is None


def test_one_prompt_and_one_layer_have_norms_alone():
    found = probed(decoder_of(num_layers=1), text=shifted_tokens(1))
    names = {f.name.split("_")[0] for f in found}
    assert names == {"norm"}
