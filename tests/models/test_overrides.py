"""Interventions at one layer, each with an answer known beforehand.

Axes: B rows, T query and S key positions, L layers, C width, H query heads, G key and value heads,
D and E head dims.
"""

from dataclasses import replace

import pytest
import torch

from kernels.errors import UserError
from kernels.masks import DenseMask, IntervalMask
from models.decoder import NormPlace
from models.overrides import LayerOverride

DOCUMENTS = [[1] * 9 + [2] * 7, [1] * 12 + [-1] * 4]


@pytest.fixture
def decoder(decoder_of):
    return decoder_of()


@pytest.fixture
def batch(batch_of):
    return batch_of(DOCUMENTS)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def reading(**fields):
    """A LayerOverride that changes nothing and keeps the named tensors in ``fields``."""
    return LayerOverride(
        **{name: lambda x, name=name: fields.__setitem__(name, x) or x for name in fields}
    ), fields


def test_an_empty_override_changes_nothing_and_records_the_attention(decoder, batch):
    plain, output = decoder(batch), decoder(batch, {1: LayerOverride()})
    same(output.logits_BTV, plain.logits_BTV)
    assert output.layers[0].probabilities_BHTS is None
    probabilities_BHTS = output.layers[1].probabilities_BHTS
    same(probabilities_BHTS.sum(2), plain.layers[1].statistics.key_mass_BHS)
    assert not probabilities_BHTS.requires_grad


def test_q_k_and_v_are_read_as_attention_uses_them(decoder, batch):
    override, seen = reading(q=None, k=None, v=None, output=None)
    record = decoder(batch, {1: override}).layers[1]
    k_BSHD = seen["k"].repeat_interleave(2, dim=2)
    score_BHTS = torch.einsum("bthd,bshd->bhts", seen["q"], k_BSHD) / 12**0.5
    visible_BHTS = batch.mask.dense_BTS()[:, None]
    weight_BHTS = score_BHTS.masked_fill(~visible_BHTS, -torch.inf).softmax(-1).nan_to_num()
    same(record.probabilities_BHTS, weight_BHTS)
    same(record.hidden_norm_BT, seen["output"].norm(dim=-1))
    assert seen["v"].shape == (2, 16, 2, 12)


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "callable"])
def test_zero_values_at_position_0_make_its_attention_a_no_op(decoder, batch, as_tensor):
    """The block's attention output is then the sum over the other keys alone."""
    override, seen = reading(v=None)
    decoder(batch, {1: override})
    zeroed_BTGE = seen["v"].clone()
    zeroed_BTGE[:, 0] = 0
    inputs, outputs = [], []
    attention = decoder.blocks[1].attention
    attention.output.register_forward_hook(lambda _, args, y: inputs.append(args[0]))
    replacement = zeroed_BTGE if as_tensor else (lambda v: zeroed_BTGE)
    outputs = decoder(batch, {1: LayerOverride(v=replacement)})
    probabilities_BHTS = outputs.layers[1].probabilities_BHTS.clone()
    probabilities_BHTS[..., 0] = 0
    v_BSHE = seen["v"].repeat_interleave(2, dim=2)
    expected_BTHE = torch.einsum("bhts,bshe->bthe", probabilities_BHTS, v_BSHE)
    same(inputs[0], expected_BTHE.flatten(2))
    assert outputs.layers[1].value_norm_BTG[:, 0].eq(0).all()


def test_zero_queries_attend_uniformly(decoder, batch):
    override = LayerOverride(q=torch.zeros(2, 16, 4, 12, dtype=torch.float64))
    record = decoder(batch, {2: override}).layers[2]
    visible_BTS = batch.mask.dense_BTS()
    uniform_BTS = visible_BTS.double() / visible_BTS.sum(-1, keepdim=True).clamp(min=1)
    same(record.probabilities_BHTS, uniform_BTS[:, None].expand(-1, 4, -1, -1))


def test_keys_replaced_by_key_0_attend_uniformly(decoder, batch):
    override = LayerOverride(k=lambda k_BTGD: k_BTGD[:, :1].expand_as(k_BTGD))
    record = decoder(batch, {0: override}).layers[0]
    expected_T = 1 / torch.arange(1, 13, dtype=torch.float64)
    same(record.statistics.first_mass_BHT[1, :, :12], expected_T.expand(4, -1))


def hide_key_0(mask: DenseMask) -> DenseMask:
    visible_BTS = mask.visible_BTS.clone()
    visible_BTS[:, 1:, 0] = False
    return replace(mask, visible_BTS=visible_BTS)


@pytest.mark.parametrize("form", ["callable", "dense", "tensor"])
def test_a_hidden_key_gets_no_attention_in_that_layer_only(decoder, batch, form):
    hidden = hide_key_0(batch.mask.to_dense())
    mask = {"callable": hide_key_0, "dense": hidden, "tensor": hidden.visible_BTS}[form]
    output = decoder(batch, {1: LayerOverride(mask=mask)})
    mass_LT = torch.stack([r.statistics.first_mass_BHT[1, 0] for r in output.layers])
    assert mass_LT[1].nonzero().flatten().tolist() == [0]
    assert mass_LT[0, :12].all() and mass_LT[2, :12].all()
    document_mass_T = output.layers[1].statistics.document_mass_BHT[0, 0]
    assert document_mass_T[1:9].eq(0).all() and document_mass_T[9:].all()


def test_a_token_seeing_itself_alone_has_alpha_1(decoder, batch):
    def isolate(mask: DenseMask):
        visible_BTS = mask.visible_BTS.clone()
        visible_BTS[:, 5] = False
        visible_BTS[:, 5, 5] = True
        return visible_BTS

    record = decoder(batch, {0: LayerOverride(mask=isolate)}).layers[0]
    same(record.probabilities_BHTS[:, :, 5, 5], torch.ones(2, 4).double())


def test_a_window_is_in_the_mask_that_an_override_gets(decoder_of, batch):
    from models.attention import SoftmaxAttention

    decoder, seen = decoder_of(attention=SoftmaxAttention.Config(window=3)), []
    decoder(batch, {0: LayerOverride(mask=lambda mask: seen.append(mask) or mask)})
    assert torch.equal(seen[0].visible_BTS, batch.mask.window(3).dense_BTS())


def test_a_patched_output_gives_the_clean_logits(decoder, batch, batch_of):
    """Activation patching: the whole state of block 1 from another batch decides what follows."""
    clean = batch_of(DOCUMENTS)
    clean.tokens_BT = clean.tokens_BT.flip(1)
    override, seen = reading(output=None)
    clean_BTV = decoder(clean, {1: override}).logits_BTV
    patched = decoder(batch, {1: LayerOverride(output=seen["output"])})
    same(patched.logits_BTV, clean_BTV)
    assert (decoder(batch).logits_BTV - clean_BTV).abs().max() > 0.1


STREAM = ("input", "attention_output", "middle", "feed_forward_output", "output")


@pytest.mark.parametrize("place", NormPlace)
def test_what_is_read_of_the_stream_adds_up(decoder_of, batch, place):
    """Each half adds what is read, after its own norm, to the stream; ``after`` norms the sums."""
    decoder = decoder_of(norm_place=place)
    override, seen = reading(**dict.fromkeys(STREAM))
    record = decoder(batch, {1: override}).layers[1]
    block = decoder.blocks[1]
    is_after = place is NormPlace.after
    norms = (
        (block.attention_norm, block.feed_forward_norm) if is_after else (torch.nn.Identity(),) * 2
    )
    same(seen["middle"], norms[0](seen["input"] + seen["attention_output"]))
    same(seen["output"], norms[1](seen["middle"] + seen["feed_forward_output"]))
    same(record.hidden_norm_BT, seen["output"].norm(dim=-1))
    read = seen["middle"] if is_after else block.feed_forward_norm(seen["middle"])
    fed = block.feed_forward(read)
    same(seen["feed_forward_output"], block.feed_forward_output_norm(fed))


@pytest.mark.parametrize("place", [NormPlace.before, NormPlace.both])
def test_a_block_whose_halves_add_nothing_hands_on_what_it_reads(decoder_of, batch, place):
    def nothing(y_BTC):
        return torch.zeros_like(y_BTC)

    override, seen = reading(input=None, output=None)
    override = replace(override, attention_output=nothing, feed_forward_output=nothing)
    decoder = decoder_of(norm_place=place)
    output = decoder(batch, {1: override})
    same(seen["output"], seen["input"])
    decoder.blocks = torch.nn.ModuleList([decoder.blocks[0], decoder.blocks[2]])
    same(output.logits_BTV, decoder(batch).logits_BTV)


@pytest.mark.parametrize("field", ["input", "middle"])
def test_a_patched_stream_inside_a_block_gives_the_clean_logits(decoder, batch, batch_of, field):
    clean = batch_of(DOCUMENTS)
    clean.tokens_BT = clean.tokens_BT.flip(1)
    override, seen = reading(**{field: None})
    clean_BTV = decoder(clean, {1: override}).logits_BTV
    patched = decoder(batch, {1: LayerOverride(**{field: seen[field]})})
    same(patched.logits_BTV, clean_BTV)
    assert (decoder(batch).logits_BTV - clean_BTV).abs().max() > 0.1


def test_a_feed_forward_is_zeroed_at_one_position(decoder, batch):
    """The others' states after the block stay, its own is what the attention left."""

    def zeroed(y_BTC):
        return y_BTC.index_fill(1, torch.tensor([4]), 0)

    override, seen = reading(middle=None, output=None)
    plain_override, plain = reading(output=None)
    decoder(batch, {1: replace(override, feed_forward_output=zeroed)})
    decoder(batch, {1: plain_override})
    others = [t for t in range(16) if t != 4]
    same(seen["output"][:, others], plain["output"][:, others])
    same(seen["output"][:, 4], seen["middle"][:, 4])
    assert (seen["output"][:, 4] - plain["output"][:, 4]).abs().max() > 0.1


def test_gradients_pass_an_override(decoder, batch):
    decoder(batch, {1: LayerOverride(v=lambda v: 2 * v)}).logits_BTV.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in decoder.parameters())


def test_overridden_layers_run_the_reference_and_the_others_what_they_would(
    decoder, batch, monkeypatch
):
    import models.attention.softmax as softmax

    used, kernel = [], softmax.sink_attention

    def spy(*args, implementation, **kwargs):
        used.append((implementation, type(args[3])))
        return kernel(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(softmax, "sink_attention", spy)
    decoder(batch, {1: LayerOverride()})
    assert used == [("auto", IntervalMask), ("reference", DenseMask), ("auto", IntervalMask)]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({3: LayerOverride()}, "overrides must name layers 0 to 2, got 3"),
        ({-1: LayerOverride()}, "overrides must name layers 0 to 2, got -1"),
        ({1: lambda x: x}, "overrides[1] must be a LayerOverride, got <class 'function'>"),
        (
            {1: LayerOverride(v=torch.zeros(2, 16, 4, 12).double())},
            "LayerOverride.v must be float64 (2, 16, 2, 12), got float64 (2, 16, 4, 12)",
        ),
        (
            {1: LayerOverride(q=lambda q: q.float())},
            "LayerOverride.q must be float64 (2, 16, 4, 12), got float32 (2, 16, 4, 12)",
        ),
        (
            {1: LayerOverride(output=lambda x: None)},
            "LayerOverride.output must be float64 (2, 16, 48), got NoneType",
        ),
        (
            {1: LayerOverride(input=torch.zeros(2, 16, 47).double())},
            "LayerOverride.input must be float64 (2, 16, 48), got float64 (2, 16, 47)",
        ),
        (
            {1: LayerOverride(feed_forward_output=0)},
            "LayerOverride.feed_forward_output must be float64 (2, 16, 48), got int",
        ),
        (
            {1: LayerOverride(mask=torch.ones(2, 16, 15, dtype=torch.bool))},
            "LayerOverride.mask must be bool (2, 16, 16), got bool (2, 16, 15)",
        ),
        (
            {1: LayerOverride(mask=lambda mask: None)},
            "LayerOverride.mask must be bool (2, 16, 16), got NoneType",
        ),
    ],
    ids=[
        "layer",
        "negative",
        "not-override",
        "shape",
        "dtype",
        "nothing",
        "width",
        "number",
        "mask",
        "no-mask",
    ],
)
def test_wrong_overrides_end_in_one_line(decoder, batch, overrides, message):
    with pytest.raises(UserError) as error:
        decoder(batch, overrides)
    assert str(error.value) == message
