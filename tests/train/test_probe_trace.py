"""What a trace keeps is what a plain forward pass computes, interventions included.

Axes: B rows, T query and S key positions, C width.
"""

import pytest
import torch
from torch.testing import assert_close

from kernels.errors import UserError
from models.attention import ATTENTIONS
from models.decoder import Decoder, DecoderConfig, NormPlace
from models.overrides import LayerOverride
from tests.train.handmade import prompts_of, shuffled_tokens
from train.probes.trace import (
    cut,
    everywhere,
    hide_first,
    hide_key,
    norm_ratio_B,
    see_itself_alone,
    trace,
    zero_at,
)


def decoder_of(attention="softmax", **changes):
    torch.manual_seed(0)
    settings = {"num_layers": 3, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "d_ff": 20}
    config = DecoderConfig(**settings | changes)
    decoder = Decoder(config, ATTENTIONS[attention].Config(), 16).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.ndim == 1, std=0.3)
    return decoder.eval()


@pytest.fixture
def batch():
    return prompts_of(shuffled_tokens(3))


@pytest.mark.parametrize("place", NormPlace)
@pytest.mark.parametrize("attention", ["softmax", "sink_token", "sigmoid"])
def test_a_trace_is_the_forward_pass(batch, attention, place):
    decoder = decoder_of(attention, norm_place=place)
    run, plain = trace(decoder, batch), decoder(batch)
    assert_close(run.logits_BTV, plain.logits_BTV)
    assert len(run.hidden_BTC) == 4
    assert_close(run.hidden_BTC[0], decoder.embedding(batch.tokens_BT))
    for layer, record in enumerate(plain.layers):
        block = decoder.blocks[layer]
        assert_close(run.hidden_BTC[layer + 1].norm(dim=-1), record.hidden_norm_BT)
        probabilities_BHTS = run.probabilities_BHTS[layer]
        assert_close(probabilities_BHTS[..., 0], record.statistics.first_mass_BHT)
        assert_close(run.v_BTGE[layer].norm(dim=-1), record.value_norm_BTG)
        assert run.q_BTHD[layer].shape == (3, 16, 4, 6)
        assert run.k_BTGD[layer].shape == (3, 16, 2, 6)
        middle_BTC = run.middle_BTC[layer]
        read_BTC = middle_BTC if place is NormPlace.after else block.feed_forward_norm(middle_BTC)
        added_BTC = block.feed_forward_output_norm(block.feed_forward(read_BTC))
        after_BTC = middle_BTC + added_BTC
        if place is NormPlace.after:
            after_BTC = block.feed_forward_norm(after_BTC)
        assert_close(run.hidden_BTC[layer + 1], after_BTC)
        if attention == "sink_token":
            assert_close(run.slot_BHT[layer], 1 - probabilities_BHTS.sum(-1))
        else:
            assert run.slot_BHT[layer] is None
    assert not run.logits_BTV.requires_grad


def test_a_trace_keeps_what_interventions_put_in_place(batch):
    decoder = decoder_of()
    value_BTGE = torch.zeros(3, 16, 2, 6, dtype=torch.float64)
    overrides = {
        0: LayerOverride(v=value_BTGE),
        1: LayerOverride(mask=see_itself_alone(5), output=zero_at(2), q=lambda q: 2 * q),
        2: LayerOverride(feed_forward_output=torch.zeros_like),
    }
    run = trace(decoder, batch, overrides)
    assert_close(run.logits_BTV, decoder(batch, overrides).logits_BTV)
    assert run.v_BTGE[0].eq(0).all() and run.v_BTGE[1].any()
    assert_close(run.middle_BTC[0], run.hidden_BTC[0])
    assert run.hidden_BTC[2][:, 2].eq(0).all() and run.hidden_BTC[2][:, 3].any()
    assert_close(run.probabilities_BHTS[1][:, :, 5, 5], torch.ones(3, 4).double())
    assert_close(run.hidden_BTC[3], run.middle_BTC[2])
    assert overrides[0].v is value_BTGE and overrides[2].output is None


def test_wrong_overrides_end_as_they_do_without_a_trace(batch):
    for overrides in ({7: LayerOverride()}, {0: "v"}, {0: LayerOverride(q=lambda q: None)}):
        with pytest.raises(UserError) as traced:
            trace(decoder_of(), batch, overrides)
        with pytest.raises(UserError) as plain:
            decoder_of()(batch, overrides)
        assert str(traced.value) == str(plain.value)


@pytest.mark.parametrize("hidden, change", [(0, hide_first), (5, hide_key(5)), (15, hide_key(15))])
def test_a_hidden_key_is_seen_by_itself_alone(batch, hidden, change):
    decoder = decoder_of()
    run = trace(decoder, batch, everywhere(decoder, mask=change))
    seen_TS = torch.ones(16, 16, dtype=torch.bool).tril()
    seen_TS[hidden + 1 :, hidden] = False
    for probabilities_BHTS in run.probabilities_BHTS:
        assert ((probabilities_BHTS > 0) == seen_TS).all()
        assert_close(probabilities_BHTS.sum(-1), torch.ones(3, 4, 16).double())


def test_a_cut_batch_gives_the_first_tokens_of_the_first_rows(batch):
    decoder = decoder_of()
    short = cut(batch, 2, 9)
    assert short.tokens_BT.shape == short.mask.start_BT.shape == (2, 9)
    assert_close(decoder(short).logits_BTV, decoder(batch).logits_BTV[:2, :9])
    assert cut(batch, 10).tokens_BT.shape == (3, 16)


def test_a_norm_ratio_is_to_the_median_of_the_others():
    hidden_BTC = torch.tensor([[6.0, 1, 2, 100], [3, 3, 3, 3]]).double()[..., None]
    assert norm_ratio_B(hidden_BTC, 0).tolist() == [3, 1]
    assert norm_ratio_B(hidden_BTC, 2).tolist() == [2 / 6, 1]
