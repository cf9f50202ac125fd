"""What a token in front costs a head whose figures are known: it says what the token's id says."""

import math

import pytest
import torch

from models.batch import IGNORE_LABEL
from tests.train.handmade import LENGTH, blank_decoder, inputs_of, set_weight, value
from train.probes.in_front import TOKENS, probe_in_front

T = 12
BOS, EOS, ANSWER = 0, 1, 2
STRENGTH = 3.0


def text(rows=4):
    """Ids 3 and up."""
    return 3 + (torch.arange(rows)[:, None] + torch.arange(T)) % (LENGTH - 3)


def with_first(token):
    return torch.cat([torch.full((4, 1), token), text()[:, :-1]], dim=1)


def told_by_first(token):
    """Uniform attention whose one value is that of ``token``: it speaks for ``ANSWER``."""
    decoder = blank_decoder(num_layers=1)
    first = decoder.blocks[0].attention
    one_hot = torch.eye(LENGTH)
    set_weight(first.value, STRENGTH * one_hot[token].outer(one_hot[token]))
    set_weight(first.output, one_hot[ANSWER].outer(one_hot[token]))
    set_weight(decoder.unembedding, one_hot)
    return decoder


def inputs(**more):
    made = inputs_of(text=text(), bos_text=with_first(BOS), eos_text=with_first(EOS), **more)
    for name, batch in made.prompts.items():
        # Text tokens 2 and up: the same labels, a place later behind a token in front.
        labels_BT = torch.full((4, T), IGNORE_LABEL)
        labels_BT[:, 1 + (name != "text") : T - (name == "text")] = ANSWER
        batch.labels_BT.copy_(labels_BT)
    return made


def loss_at(position, weight):
    """With logit STRENGTH * weight for the answer and 1 for the own id."""
    told = STRENGTH * weight
    return math.log(math.exp(told) + math.e + LENGTH - 2) - told


@pytest.mark.parametrize("token, name", [(BOS, "cost_bos"), (EOS, "cost_eos")])
def test_a_token_that_says_the_answer_lowers_the_loss(token, name):
    decoder, given = told_by_first(token), inputs()
    found = list(probe_in_front(decoder, given))
    without = loss_at(0, 0.0)
    # Position i sees i + 1 keys alike, one of them the token.
    told = sum(loss_at(i, 1 / (i + 1)) for i in range(2, T)) / (T - 2)
    assert value(found, name) == pytest.approx(told - without)
    other = {"cost_bos": "cost_eos", "cost_eos": "cost_bos"}[name]
    assert value(found, other) == pytest.approx(0, abs=1e-12)
    for text_token in ("cost_token", "cost_token_most", "cost_token_deviation"):
        assert value(found, text_token) == pytest.approx(0, abs=1e-12)
    # None is cheaper than what lowers the loss.
    assert token != BOS or value(found, "cheaper_tokens") == 0


def test_text_tokens_that_mislead_cost_more_than_the_bos():
    """Every text token but the BOS and the EOS speaks against the answer."""
    decoder = blank_decoder(num_layers=1)
    against = torch.zeros(LENGTH, LENGTH)
    against[ANSWER, 3] = -STRENGTH
    first = decoder.blocks[0].attention
    set_weight(first.value, torch.eye(LENGTH))
    set_weight(first.output, against)
    set_weight(decoder.unembedding, torch.eye(LENGTH))
    found = list(probe_in_front(decoder, inputs()))
    num_known = LENGTH - 3
    assert num_known <= TOKENS
    assert value(found, "cost_token_least") == pytest.approx(value(found, "cost_bos"))
    assert value(found, "cost_token_most") > value(found, "cost_bos")
    # Of all that occur it is id 3 alone.
    spread = value(found, "cost_token_most") - value(found, "cost_token_least")
    mean = value(found, "cost_token") - value(found, "cost_token_least")
    assert mean == pytest.approx(spread / num_known)
    deviation = spread * math.sqrt(1 / num_known)
    assert value(found, "cost_token_deviation") == pytest.approx(deviation)
    assert value(found, "cheaper_tokens") == 0
    decoder.blocks[0].attention.output.weight.data.neg_()
    found = list(probe_in_front(decoder, inputs()))
    assert value(found, "cheaper_tokens") == pytest.approx(1 / num_known)


def test_where_the_embedding_of_the_bos_lies():
    decoder, given = blank_decoder(num_layers=1), inputs()
    embedding_VC = torch.eye(LENGTH)
    embedding_VC[BOS] = 0
    embedding_VC[BOS, 3:5] = torch.tensor([3.0, 4.0])
    set_weight(decoder.embedding, embedding_VC)
    found = list(probe_in_front(decoder, given))
    num_known = LENGTH - 3
    assert value(found, "norm_bos") == pytest.approx(5)
    assert value(found, "cosine_bos") == pytest.approx(7 / (5 * math.sqrt(num_known)))


def test_the_same_every_time_and_none_without_a_bos():
    decoder = told_by_first(BOS)
    assert list(probe_in_front(decoder, inputs())) == list(probe_in_front(decoder, inputs()))
    assert list(probe_in_front(decoder, inputs_of(text=text()))) == []
