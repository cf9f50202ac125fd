"""What single kinds of attention, position, norm and feed-forward compute, against other code.

Axes: B rows, T positions, C width, H query heads, G key and value heads, D and E head dims.
"""

import pytest
import torch
from torch import nn

from kernels.attention import sink_attention
from kernels.errors import UserError
from kernels.masks import IntervalMask
from models.attention import ATTENTIONS, AttentionConfig
from models.attention.gated import GateKind, GatePlace
from models.decoder import DecoderConfig, NormPlace
from models.positions import POSITIONS

DOCUMENTS = [[1] * 7 + [2] * 5, [1] * 9 + [-1] * 3]


def config_of(name, **settings):
    return ATTENTIONS[name].Config(**settings)


def layer(name, **settings):
    """One attention layer of 4 query and 2 key heads of 12, with large weights, in fp64."""
    torch.manual_seed(1)
    model = DecoderConfig(num_layers=1, d_model=48, num_heads=4, num_kv_heads=2, d_ff=8)
    made = ATTENTIONS[name](config_of(name, **settings), model)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.double()


def attended(made, x_BTC, inputs):
    return made(x_BTC, inputs).y_BTC


@pytest.fixture
def inputs():
    from models.attention import LayerInputs

    return LayerInputs(
        mask=IntervalMask.from_documents(torch.tensor(DOCUMENTS)),
        rotation=None,
        slopes_H=None,
        statistics="full",
        key_mass_tap_BHS=None,
        override=None,
    )


@pytest.fixture
def x_BTC():
    return torch.randn(2, 12, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("position", ["rope", "none", "alibi", "sinusoidal", "learned"])
@pytest.mark.parametrize("place", NormPlace)
@pytest.mark.parametrize("pinned", [False, True], ids=["causal", "documents"])
def test_a_sink_token_is_a_token_before_every_row(decoder_of, batch_of, position, pinned, place):
    """The same logits as rows of T + 1 tokens whose first one all queries see."""
    documents = DOCUMENTS if pinned else [[1] * 12, [1] * 12]
    settings = {"position": position, "norm": "layer_norm", "norm_place": place, "rope_share": 0.5}
    carried = decoder_of(attention=config_of("sink_token", row_sum=0.3), **settings)
    plain = decoder_of(attention=config_of("softmax", row_sum=0.3), **settings)
    weights = carried.state_dict()
    sink_1C = weights.pop("sink_token.weight")
    weights["embedding.weight"] = weights["embedding.weight"].clone()
    weights["embedding.weight"][96] = sink_1C[0]
    plain.load_state_dict(weights)

    batch = batch_of(documents)
    batch.tokens_BT %= 96
    longer = batch_of([[0, *row] for row in documents], pinned=1)
    longer.tokens_BT = torch.cat([torch.full((2, 1), 96), batch.tokens_BT], 1)
    longer.positions_BT = torch.cat([torch.zeros(2, 1).long(), batch.positions_BT + 1], 1)
    ours, theirs = carried(batch), plain(longer)
    is_text_BT = batch.document_BT > 0
    torch.testing.assert_close(
        ours.logits_BTV[is_text_BT], theirs.logits_BTV[:, 1:][is_text_BT], rtol=1e-9, atol=1e-9
    )
    for record, wanted in zip(ours.layers, theirs.layers, strict=True):
        first_BHT = wanted.statistics.first_mass_BHT[:, :, 1:]
        torch.testing.assert_close(record.statistics.null_mass_BHT, first_BHT)
        keys_BHS = wanted.statistics.key_mass_BHS[:, :, 1:]
        torch.testing.assert_close(record.statistics.key_mass_BHS, keys_BHS)


def test_features_of_the_elu_kernel_keep_their_precision():
    made = layer("elu_kernel")
    x_BTHD = torch.tensor([-8.0, -7.0, -1.0, 0.0, 2.0], dtype=torch.bfloat16)
    mapped, _ = made.features(x_BTHD, x_BTHD)
    exact = torch.where(x_BTHD < 0, x_BTHD.double().exp(), x_BTHD.double() + 1)
    torch.testing.assert_close(mapped.double(), exact, rtol=2**-8, atol=0)


def test_off_by_one_adds_one_to_the_denominator(x_BTC, inputs):
    made = layer("off_by_one")
    q, k, v = made.project(x_BTC)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 12**0.5
    visible = inputs.mask.dense_BTS()[:, None]
    weights = scores.exp() * visible
    weights = weights / (1 + weights.sum(-1, keepdim=True))
    out = torch.einsum("bhij,bjhe->bihe", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(attended(made, x_BTC, inputs), made.output(out.flatten(2)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"shared": True}, {"learned_dims": 3}, {"value_norm": 5.0}, {"value_norm": 0.0}],
    ids=str,
)
def test_a_bias_is_a_key_and_a_value_in_front(x_BTC, inputs, settings):
    """softmax over T + 1 keys written out; without a value it is the K bias."""
    made = layer("kv_bias", **settings)
    q, k, v = made.project(x_BTC)
    key_GD = torch.zeros(2, 12, dtype=torch.float64)
    key_GD[:, : made.key_GD.shape[1]] = made.key_GD.detach()
    value_GE = torch.zeros(2, 12, dtype=torch.float64)
    if "value_norm" in settings:
        value_GE[:, 0] = settings["value_norm"]
    else:
        value_GE[:] = made.value_GE.detach()
    k = torch.cat([key_GD.expand(2, 1, 2, 12), k], 1).repeat_interleave(2, 2)
    v = torch.cat([value_GE.expand(2, 1, 2, 12), v], 1).repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 12**0.5
    visible = inputs.mask.dense_BTS()[:, None]
    slot = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~torch.cat([slot, visible], -1), -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    result = made(x_BTC, inputs)
    torch.testing.assert_close(result.y_BTC, made.output(out.flatten(2)))
    torch.testing.assert_close(result.statistics.null_mass_BHT, weights[..., 0])
    if settings.get("value_norm") == 0:
        alone = layer("k_bias")
        alone.load_state_dict(made.state_dict())
        torch.testing.assert_close(attended(alone, x_BTC, inputs), result.y_BTC)


def test_a_value_bias_is_added_to_every_output(x_BTC, inputs):
    made, plain = layer("v_bias"), layer("softmax")
    plain.load_state_dict(made.state_dict(), strict=False)
    value_C = made.output(made.value_HE.flatten()).detach()
    torch.testing.assert_close(
        attended(made, x_BTC, inputs) - value_C, attended(plain, x_BTC, inputs)
    )


@pytest.mark.parametrize("gate", GateKind)
@pytest.mark.parametrize("place", GatePlace)
def test_gates(x_BTC, inputs, gate, place):
    made = layer("gated", gate=gate, place=place)
    q, k, v = ATTENTIONS["softmax"].project(made, x_BTC)
    heads = 4 if place is GatePlace.output else 2
    width = {"element": (heads, 12), "head": (heads, 1), "shared": (1, 12)}[gate.value]
    gates = made.gate(x_BTC).sigmoid().reshape(2, 12, *width)
    if place is GatePlace.values:
        out = sink_attention(q, k, v * gates, inputs.mask).out_BTHE
    else:
        out = sink_attention(q, k, v, inputs.mask).out_BTHE * gates
    torch.testing.assert_close(attended(made, x_BTC, inputs), made.output(out.flatten(2)))


def test_a_sigmoids_bias_is_added_to_every_score(x_BTC, inputs):
    made = layer("sigmoid", bias=-1.5)
    q_BTHD, k_BTGD, v_BTGE = made.project(x_BTC)
    k_BTHD, v_BTHE = (x.repeat_interleave(2, dim=2) for x in (k_BTGD, v_BTGE))
    x_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD) / 12**0.5 - 1.5
    weights_BHTS = torch.sigmoid(x_BHTS) * inputs.mask.dense_BTS()[:, None]
    out_BTHE = torch.einsum("bhts,bshe->bthe", weights_BHTS, v_BTHE)
    torch.testing.assert_close(attended(made, x_BTC, inputs), made.output(out_BTHE.flatten(2)))


def test_row_sums_scale_the_output(x_BTC, inputs):
    made, plain = layer("softmax", row_sum=0.2), layer("softmax")
    torch.testing.assert_close(attended(made, x_BTC, inputs), 0.2 * attended(plain, x_BTC, inputs))


def test_windows_and_layers_that_have_none(decoder_of, batch_of):
    config = config_of("softmax", window=3, global_every=2)
    masks = decoder_of(attention=config, num_layers=5).layer_masks(batch_of(DOCUMENTS).mask)
    plain, windowed = batch_of(DOCUMENTS).mask, batch_of(DOCUMENTS).mask.window(3)
    for index, mask in enumerate(masks):
        wanted = plain if index in (1, 3) else windowed
        assert torch.equal(mask.start_BT, wanted.start_BT)
    assert masks[0] is masks[2] is masks[4]
    with pytest.raises(UserError, match=r"attention\.global_every must be >= 1 beside"):
        config_of("softmax", global_every=2)


def test_alibi_has_the_papers_slopes():
    def slopes(heads):
        model = DecoderConfig(num_layers=1, d_model=2 * heads, num_heads=heads, d_ff=8)
        return POSITIONS["alibi"](model).slopes(torch.device("cpu")).tolist()

    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(1) == [2.0**-8]
    # The lower power of two, then every other slope of the next.
    assert slopes(6) == pytest.approx([2.0 ** -(2 * i) for i in range(1, 5)] + [0.5, 0.125])


def test_rope_turns_its_share_and_leaves_the_rest(decoder_of, batch_of):
    position = decoder_of(rope_share=0.5).position
    rotation = position.rotation(torch.arange(5)[None], torch.float64)
    x_BTHD = torch.randn(1, 5, 2, 12, dtype=torch.float64)
    turned = rotation(x_BTHD)
    assert torch.equal(turned[..., 6:], x_BTHD[..., 6:])
    whole = decoder_of(head_dim=6).position.rotation(torch.arange(5)[None], torch.float64)
    assert torch.equal(turned[..., :6], whole(x_BTHD[..., :6]))


def test_sinusoids_are_the_papers(decoder_of):
    x_BTC = torch.full((1, 3, 48), 0.5, dtype=torch.float64)
    added_TC = decoder_of(position="sinusoidal").position.embed(x_BTC, torch.arange(3)[None])[0]
    added_TC -= 0.5 * 48**0.5
    for channel in (0, 5, 23):
        angle_T = torch.arange(3, dtype=torch.float64) * 10000.0 ** (-channel / 24)
        torch.testing.assert_close(added_TC[:, channel], angle_T.sin())
        torch.testing.assert_close(added_TC[:, 24 + channel], angle_T.cos())


@pytest.mark.parametrize("place", NormPlace)
def test_norm_places(decoder_of, batch_of, place):
    decoder = decoder_of(num_layers=1, norm_place=place)
    (block,) = decoder.blocks
    batch = batch_of([[1] * 5])
    seen = {}
    for name in ("attention", "feed_forward"):
        half = getattr(block, name)
        half.register_forward_hook(
            lambda _, given, got, name=name: seen.update({name: (given, got)})
        )
    logits_BTV = decoder(batch).logits_BTV
    x = decoder.embedding(batch.tokens_BT)
    for name in ("attention", "feed_forward"):
        norm, after = getattr(block, f"{name}_norm"), getattr(block, f"{name}_output_norm")
        given, got = seen[name]
        y = got.y_BTC if name == "attention" else got
        torch.testing.assert_close(given[0], x if place is NormPlace.after else norm(x))
        x = norm(x + y) if place is NormPlace.after else x + after(y)
    final = nn.Identity() if place is NormPlace.after else decoder.norm
    torch.testing.assert_close(logits_BTV, decoder.unembedding(final(x))[..., :97])


def test_matched_feed_forwards_have_as_many_parameters(decoder_of):
    counts = {
        name: decoder_of(feed_forward=name, match_parameters=True, d_ff=40).num_parameters()
        for name in ("relu", "gelu", "swish", "reglu", "geglu", "swiglu")
    }
    assert len(set(counts.values())) == 1


def test_a_config_of_no_kind_is_refused(decoder_of):
    with pytest.raises(UserError, match="attention must be the Config of one of"):
        decoder_of(attention=AttentionConfig())
