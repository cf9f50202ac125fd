"""What the decoder computes: who sees whom, precision, records, compilation, settings.

Axes: B rows, T positions, S key positions, C width, H heads, V vocabulary.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from kernels.errors import UserError
from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import IGNORE_LABEL
from models.decoder import Decoder, DecoderConfig
from models.overrides import LayerOverride

TWO_DOCUMENTS = [[1] * 7 + [2] * 9]
PINNED = [[0] + [1] * 6 + [2] * 9]
PADDED = [[1] * 5 + [2] * 6 + [-1] * 5, [-1] * 16]


def changed_positions(decoder, batch, position, *, row=0):
    """bool_T: where row 0's logits move when the token at ``position`` is another one."""
    before_BTV = decoder(batch).logits_BTV
    batch.tokens_BT[row, position] = (batch.tokens_BT[row, position] + 1) % decoder.vocab_size
    difference_TV = (decoder(batch).logits_BTV - before_BTV)[row].abs()
    # Far above fp64 rounding, far below the effect of another token.
    return difference_TV.amax(-1) > 1e-9


def loss_of(decoder, batch, **kwargs):
    logits_BTV = decoder(batch, **kwargs).logits_BTV
    return F.cross_entropy(
        logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE_LABEL
    )


@pytest.mark.parametrize("position", [0, 6, 15])
def test_a_token_changes_itself_and_later_positions_only(decoder_of, batch_of, position):
    changed_T = changed_positions(decoder_of(), batch_of([[1] * 16]), position)
    assert changed_T.tolist() == [i >= position for i in range(16)]


def test_documents_do_not_see_each_other(decoder_of, batch_of):
    changed_T = changed_positions(decoder_of(), batch_of(TWO_DOCUMENTS), 2)
    assert changed_T.tolist() == [2 <= i < 7 for i in range(16)]


def test_a_causal_mask_crosses_documents(decoder_of, batch_of):
    batch = batch_of(TWO_DOCUMENTS, causal_across=True)
    assert changed_positions(decoder_of(), batch, 2).tolist() == [i >= 2 for i in range(16)]


def test_all_documents_see_a_pinned_bos_and_nothing_else_of_others(decoder_of, batch_of):
    decoder = decoder_of()
    assert changed_positions(decoder, batch_of(PINNED, pinned=1), 0).all()
    changed_T = changed_positions(decoder, batch_of(PINNED, pinned=1), 3)
    assert changed_T.tolist() == [3 <= i < 7 for i in range(16)]


def test_a_window_bounds_the_reach_of_each_layer(decoder_of, batch_of):
    decoder = decoder_of(attention=SoftmaxAttention.Config(window=3), num_layers=2)
    changed_T = changed_positions(decoder, batch_of([[1] * 16]), 4)
    assert changed_T.tolist() == [4 <= i <= 4 + 2 * (3 - 1) for i in range(16)]


def test_the_window_mask_is_derived_once_a_forward(decoder_of, batch_of, monkeypatch):
    windows, window = [], IntervalMask.window

    def counted(mask, size):
        windows.append(size)
        return window(mask, size)

    monkeypatch.setattr(IntervalMask, "window", counted)
    output = decoder_of(attention=SoftmaxAttention.Config(window=3))(batch_of([[1] * 16]))
    assert windows == [3]
    assert len(output.layers) == 3


def test_layer_masks_are_what_the_statistics_are_read_against(decoder_of, batch_of):
    batch = batch_of([[1] * 16])
    decoder = decoder_of(attention=SoftmaxAttention.Config(window=3))
    masks = decoder.layer_masks(batch.mask)
    assert masks[0] is masks[1] is masks[2]
    assert masks[0].keys_per_query_BT()[0].tolist() == [1, 2, *[3] * 14]
    assert all(mask is batch.mask for mask in decoder_of().layer_masks(batch.mask))


def test_padding_tokens_change_nothing_elsewhere(decoder_of, batch_of):
    changed_T = changed_positions(decoder_of(), batch_of(PADDED), 12)
    assert changed_T.tolist() == [i == 12 for i in range(16)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_documents_equal_documents_alone(decoder_of, batch_of, dtype):
    decoder, batch = decoder_of(dtype=dtype), batch_of([[1] * 7 + [2] * 6 + [-1] * 3])
    packed_TV = decoder(batch).logits_BTV[0]
    for first, last in [(0, 7), (7, 13)]:
        tokens_BT = batch.tokens_BT[:, first:last]
        alone_TV = decoder(batch_of([[1] * (last - first)], tokens_BT=tokens_BT)).logits_BTV[0]
        torch.testing.assert_close(packed_TV[first:last], alone_TV, rtol=0, atol=1e-5)


def test_identical_tokens_have_identical_states_under_rope(decoder_of, batch_of):
    """Nothing but the mask tells positions apart, and all visible values are equal (no BOS)."""
    decoder, states = decoder_of(), []
    read = LayerOverride(output=lambda x_BTC: states.append(x_BTC) or x_BTC)
    decoder(
        batch_of([[1] * 16], tokens_BT=torch.full((1, 16), 5)),
        {layer: read for layer in range(3)},
    )
    for x_BTC in states:
        torch.testing.assert_close(x_BTC, x_BTC[:, :1].expand_as(x_BTC), rtol=0, atol=1e-11)
    assert len(states) == 3
    decoder(batch_of([[1] * 16]), {2: read})
    assert (states[3] - states[3][:, :1]).abs().max() > 0.1


def test_rope_knows_distances_only_and_no_longest_context(decoder_of, batch_of):
    decoder, batch = decoder_of(), batch_of([[1] * 16])
    here_BTV = decoder(batch).logits_BTV
    batch.positions_BT += 100_000
    torch.testing.assert_close(decoder(batch).logits_BTV, here_BTV, rtol=0, atol=1e-7)
    batch.positions_BT[:, 8:] += 1
    assert (decoder(batch).logits_BTV - here_BTV).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_agrees_with_fp64(decoder_of, batch_of, dtype):
    batch, decoder = batch_of(PADDED), decoder_of(dtype=dtype)
    output, exact = decoder(batch), copy.deepcopy(decoder).double()(batch)
    error_BTV = output.logits_BTV.double() - exact.logits_BTV
    # Three layers of rounding, each at most a few units in the last place.
    assert error_BTV.norm() / exact.logits_BTV.norm() < 20 * torch.finfo(dtype).eps
    assert output.logits_BTV.dtype == dtype
    for value in (output.layers[2].hidden_norm_BT, output.layers[2].value_norm_BTG):
        assert value.dtype == torch.float32


@pytest.mark.parametrize("fp32_residual", [False, True])
def test_the_residual_stream_under_autocast(decoder_of, batch_of, fp32_residual):
    decoder = decoder_of(dtype=torch.float32, fp32_residual=fp32_residual)
    batch, states = batch_of(PADDED), []
    exact_BTV = decoder(batch).logits_BTV
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(decoder, batch)
        read = LayerOverride(output=lambda x_BTC: states.append(x_BTC) or x_BTC)
        logits_BTV = decoder(batch, {2: read}).logits_BTV
    loss.backward()
    assert states[0].dtype == (torch.float32 if fp32_residual else torch.bfloat16)
    assert logits_BTV.dtype == torch.bfloat16
    assert (logits_BTV - exact_BTV).norm() / exact_BTV.norm() < 20 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad.isfinite().all() and p.grad.any() for p in decoder.parameters())


def test_angles_are_exact_in_a_half_precision_model(decoder_of):
    """Frequencies kept as a buffer would be rounded with the weights by ``.half()``."""
    positions_BT = torch.tensor([[0, 1, 4095, 100_001]])
    exact = decoder_of().position.rotation(positions_BT, torch.float64)
    rotation = decoder_of(dtype=torch.float16).position.rotation(positions_BT, torch.float32)
    # fp32 rounds an angle of 1e5 radians by up to 4e-3.
    torch.testing.assert_close(rotation.cos_BTF.double(), exact.cos_BTF, rtol=0, atol=8e-3)
    torch.testing.assert_close(
        rotation.sin_BTF[:, :3].double(), exact.sin_BTF[:, :3], atol=3e-4, rtol=0
    )


def test_gradients_are_finite_with_padding_and_reach_every_weight(decoder_of, batch_of):
    decoder = decoder_of()
    loss_of(decoder, batch_of(PADDED)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_padded_rows_of_the_vocabulary_have_no_logit_and_no_gradient(decoder_of, batch_of):
    decoder, batch = decoder_of(vocab_multiple=64), batch_of([[1] * 16])
    assert decoder.embedding.weight.shape == decoder.unembedding.weight.shape == (128, 48)
    assert decoder(batch).logits_BTV.shape == (1, 16, 97)
    loss_of(decoder, batch).backward()
    assert not decoder.unembedding.weight.grad[97:].any()
    assert decoder.unembedding.weight.grad[:97].abs().sum(1).all()


def test_tied_embeddings_are_one_parameter(decoder_of, batch_of):
    tied, untied = decoder_of(tie_embeddings=True), decoder_of()
    untied.load_state_dict(tied.state_dict(), strict=False)
    untied.unembedding.weight.data.copy_(tied.embedding.weight)
    batch = batch_of([[1] * 16])
    torch.testing.assert_close(tied(batch).logits_BTV, untied(batch).logits_BTV)
    assert untied.num_parameters().total - tied.num_parameters().total == 128 * 48
    assert untied.num_parameters().non_embedding == tied.num_parameters().non_embedding


def test_num_parameters_counts_by_hand():
    config = DecoderConfig(num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, d_ff=12)
    counts = Decoder(config, SoftmaxAttention.Config(), 64).num_parameters()
    attention, feed_forward, norms = 8 * 8 + 2 * 8 * 4 + 8 * 8, 3 * 8 * 12, 2 * 8
    assert counts.non_embedding == 2 * (attention + feed_forward + norms) + 8
    assert counts.total == counts.non_embedding + 2 * 64 * 8


def test_records_hold_norms_of_states_and_values(decoder_of, batch_of):
    decoder, batch, seen = decoder_of(), batch_of(PADDED), {}
    read = LayerOverride(
        v=lambda v: seen.update(v=v) or v, output=lambda x: seen.update(output=x) or x
    )
    decoder(batch, {1: read})
    record = decoder(batch).layers[1]
    torch.testing.assert_close(record.hidden_norm_BT, seen["output"].square().sum(-1).sqrt())
    torch.testing.assert_close(record.value_norm_BTG, seen["v"].square().sum(-1).sqrt())
    assert not record.hidden_norm_BT.requires_grad and not record.value_norm_BTG.requires_grad
    assert record.statistics.first_mass_BHT.shape == (2, 4, 16)
    assert record.probabilities_BHTS is None


def test_statistics_off_records_nothing_and_changes_no_logit(decoder_of, batch_of):
    decoder, batch = decoder_of(), batch_of(PADDED)
    off = decoder(batch, statistics="off")
    assert [tuple(record) for record in off.layers] == [(None, None, None, None)] * 3
    torch.testing.assert_close(off.logits_BTV, decoder(batch).logits_BTV, rtol=0, atol=1e-12)


def test_entropy_comes_with_full_statistics_only(decoder_of, batch_of):
    decoder, batch = decoder_of(), batch_of(PADDED)
    assert decoder(batch).layers[0].statistics.entropy_BHT is None
    assert decoder(batch, statistics="full").layers[0].statistics.entropy_BHT.shape == (2, 4, 16)


def test_tap_gradients_are_the_key_mass(decoder_of, batch_of):
    decoder, batch = decoder_of(), batch_of(PADDED)
    taps = decoder.key_mass_taps(batch)
    loss_of(decoder, batch, key_mass_taps=taps).backward()
    for tap_BHS, record in zip(taps, decoder(batch).layers, strict=True):
        torch.testing.assert_close(tap_BHS.grad, record.statistics.key_mass_BHS)
        assert tap_BHS.grad.sum(-1).allclose(torch.tensor([[11.0] * 4, [0.0] * 4]).double())


# torch.compile itself instantiates the Function that a tap goes through.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "documents, pinned, window",
    [
        ([[1] * 16] * 2, 0, None),
        pytest.param(PADDED, 0, 3, marks=pytest.mark.slow),
        (PINNED * 2, 1, None),
    ],
    ids=["causal", "padded-window", "pinned"],
)
def test_compiles_without_a_graph_break(decoder_of, batch_of, documents, pinned, window):
    attention = SoftmaxAttention.Config(window=window)
    decoder = decoder_of(num_layers=2, attention=attention)
    batch, results = batch_of(documents, pinned=pinned), []
    torch._dynamo.reset()
    for model in (decoder, torch.compile(decoder, fullgraph=True, backend="aot_eager")):
        decoder.zero_grad()
        taps = decoder.key_mass_taps(batch)
        output = model(batch, key_mass_taps=taps)
        output.logits_BTV.logsumexp(-1).sum().backward()
        record = output.layers[1]
        results.append(
            {
                "logits": output.logits_BTV,
                "statistics": record.statistics,
                "norms": (record.hidden_norm_BT, record.value_norm_BTG),
                "key mass": [tap.grad for tap in taps],
                "gradients": [parameter.grad.clone() for parameter in decoder.parameters()],
            }
        )
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "model.num_layers must be >= 1, got 0"),
        ({"d_ff": -4}, "model.d_ff must be >= 1, got -4"),
        ({"vocab_multiple": 0}, "model.vocab_multiple must be >= 1, got 0"),
        ({"head_dim": 0}, "model.head_dim must be >= 1 or null, got 0"),
        ({"num_kv_heads": 3}, "model.num_kv_heads must divide model.num_heads = 4, got 3"),
        (
            {"d_model": 50},
            "model.d_model must be a multiple of model.num_heads = 4 if model.head_dim is null,"
            " got 50",
        ),
        ({"d_model": 60}, "model.head_dim must be even for rope, got 15"),
        ({"norm_eps": 0.0}, "model.norm_eps must be > 0, got 0.0"),
        ({"rope_base": -1.0}, "model.rope_base must be > 0, got -1.0"),
        (
            {"initialization": "zeros"},
            "model.initialization must be one of gu, normal, got 'zeros'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_end_in_one_line(decoder_of, changes, message):
    with pytest.raises(UserError) as error:
        decoder_of(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize("field", ["norm", "position", "feed_forward"])
def test_an_unknown_kind_is_answered_with_the_known_ones(decoder_of, field):
    with pytest.raises(UserError, match=rf"model\.{field} must be one of .*, got 'unheard_of'"):
        decoder_of(**{field: "unheard_of"})


def test_wrong_attention_settings_end_in_one_line(decoder_of):
    with pytest.raises(UserError, match=r"^attention\.window must be >= 1 or null, got 0$"):
        SoftmaxAttention.Config(window=0)
    with pytest.raises(UserError, match=r"^attention\.implementation must be one of .*'quick'$"):
        SoftmaxAttention.Config(implementation="quick")
    with pytest.raises(UserError, match=r"^tokenizer\.vocab_size must be >= 2, got 1$"):
        decoder_of(vocab_size=1)
