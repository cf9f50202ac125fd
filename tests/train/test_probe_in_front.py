"""What a token in front costs a head whose figures are known: it says what the token's id says."""

import math

import pytest
import torch

from models.batch import IGNORE_LABEL
from tests.train.handmade import LENGTH, blank_decoder, inputs_of, set_weight, value
from train.probes import in_front
from train.probes.in_front import probe_in_front
from train.probes.losses import probe_losses

T = 12
BOS, EOS, ANSWER, UNUSED = 0, 1, 2, LENGTH - 1
STRENGTH = 3.0
ROWS = 4
KNOWN = range(3, UNUSED)
"""Ids of the text: the BOS, the EOS, the answer and one more never occur."""


def text():
    return 3 + (torch.arange(ROWS)[:, None] + torch.arange(T)) % len(KNOWN)


def with_first(token):
    return torch.cat([torch.full((ROWS, 1), token), text()[:, :-1]], dim=1)


def speaking(strengths=None):
    """Uniform attention; how strongly an id says that ``ANSWER`` comes next, by id."""
    decoder = blank_decoder(num_layers=1)
    first = decoder.blocks[0].attention
    said_CD = torch.zeros(LENGTH, LENGTH)
    for token, strength in (strengths or {}).items():
        said_CD[ANSWER, token] = strength
    set_weight(first.value, torch.eye(LENGTH))
    set_weight(first.output, said_CD)
    set_weight(decoder.unembedding, torch.eye(LENGTH))
    return decoder


def inputs(*, eos=True):
    """Labels as real prompts have them: all ``ANSWER``, a place later behind a token in front."""
    prompts = {"text": text(), "bos_text": with_first(BOS)}
    made = inputs_of(**prompts, **({"eos_text": with_first(EOS)} if eos else {}))
    for name, batch in made.prompts.items():
        labels_BT = torch.full((ROWS, T), IGNORE_LABEL)
        labels_BT[:, slice(1, T - 1) if name != "text" else slice(0, T - 2)] = ANSWER
        batch.labels_BT.copy_(labels_BT)
    return made


def loss_with(weight, strength=STRENGTH):
    """A label's, where what speaks has that share of the attention; the own id's logit is 1."""
    told = strength * weight
    return math.log(math.exp(told) + math.e + LENGTH - 2) - told


def cost_of(strength):
    """What a first token that says ``ANSWER`` so strongly costs: position i sees i + 1 keys alike,
    one of them that token."""
    said = sum(loss_with(1 / (i + 1), strength) for i in range(1, T - 1)) / (T - 2)
    return said - loss_with(0)


def share_below(decoder):
    return value(list(probe_in_front(decoder, inputs())), "cheaper_token_share")


@pytest.mark.parametrize(("token", "name"), [(BOS, "cost_bos"), (EOS, "cost_eos")])
def test_a_token_that_says_the_answer_lowers_the_loss(token, name):
    found = list(probe_in_front(speaking({token: STRENGTH}), inputs()))
    assert value(found, name) == pytest.approx(cost_of(STRENGTH))
    other = {"cost_bos": "cost_eos", "cost_eos": "cost_bos"}[name]
    for nothing in (other, "cost_token", "cost_token_most", "cost_token_deviation"):
        assert value(found, nothing) == pytest.approx(0, abs=1e-12)
    assert {one.input for one in found} == {"text"}


def test_the_bos_costs_what_the_losses_say():
    decoder = speaking({BOS: -STRENGTH, 5: 2.0})
    cost = value(list(probe_in_front(decoder, inputs())), "cost_bos")
    assert cost > 0.1
    assert cost == pytest.approx(-value(list(probe_losses(decoder, inputs())), "cost_without_bos"))


def test_mean_spread_and_extremes_are_of_the_ids_of_the_text(monkeypatch):
    """Id 3 alone speaks against the answer, so of the others each costs the same."""
    monkeypatch.setattr(in_front, "TOKENS", 100)
    # Ids that aren't in the text say much, and are never tried.
    found = list(probe_in_front(speaking({3: -STRENGTH, UNUSED: 50.0, ANSWER: 50.0}), inputs()))
    least, most = value(found, "cost_token_least"), value(found, "cost_token_most")
    spread = most - least
    assert spread > 0.1
    assert value(found, "cost_token") == pytest.approx(least + spread / len(KNOWN))
    deviation = spread * math.sqrt(1 / len(KNOWN))
    assert value(found, "cost_token_deviation") == pytest.approx(deviation)


def test_the_share_of_tokens_that_cost_less_than_the_bos(monkeypatch):
    monkeypatch.setattr(in_front, "TOKENS", 100)
    # Each id of the text alike, as the BOS: none is cheaper. Then one; then all.
    assert share_below(speaking()) == 0
    assert share_below(speaking({4: STRENGTH})) == pytest.approx(1 / len(KNOWN))
    assert share_below(speaking({BOS: -STRENGTH})) == 1
    # And all cost more than a BOS that speaks for it.
    found = list(probe_in_front(speaking({BOS: STRENGTH}), inputs()))
    assert value(found, "cost_token_least") > value(found, "cost_bos") + 0.1


def test_the_ids_that_are_tried_are_drawn_the_same_every_time(monkeypatch):
    monkeypatch.setattr(in_front, "TOKENS", 5)
    decoder = speaking({token: 0.3 * token for token in KNOWN})
    first = list(probe_in_front(decoder, inputs()))
    torch.manual_seed(1)
    assert list(probe_in_front(decoder, inputs())) == first
    monkeypatch.setattr(in_front, "TOKENS", 100)
    every = list(probe_in_front(decoder, inputs()))
    for name in ("cost_token", "cost_token_deviation"):
        assert value(every, name) != pytest.approx(value(first, name)), "five are not all"
    # Nor the first five.
    monkeypatch.setattr(in_front, "_drawn", lambda num_tokens: torch.arange(5))
    assert value(list(probe_in_front(decoder, inputs())), "cost_token") != pytest.approx(
        value(first, "cost_token")
    )
    monkeypatch.setattr(in_front, "_drawn", lambda num_tokens: torch.arange(1))
    names = {one.name for one in probe_in_front(decoder, inputs())}
    assert "cost_token" in names and "cost_token_deviation" not in names, "one has no spread"


def test_without_an_eos_or_a_bos():
    names = {one.name for one in probe_in_front(speaking(), inputs(eos=False))}
    assert names == {
        *("cost_bos", "cost_token", "cost_token_deviation", "cost_token_least"),
        *("cost_token_most", "cheaper_token_share", "cost_shared", "bos_cosine", "bos_length"),
        *("cost_noise", "cost_noise_deviation", "cost_noise_least", "cost_noise_most"),
    }
    assert list(probe_in_front(speaking(), inputs_of(text=text()))) == []


def with_bos_row(decoder, row_C):
    """One-hot ids but for the BOS."""
    rows_VC = torch.eye(LENGTH, dtype=torch.float64)
    rows_VC[BOS] = row_C
    set_weight(decoder.embedding, rows_VC)
    return decoder


def along(*ids, length):
    """That length, along the sum of these ids' one-hot vectors."""
    row_C = torch.zeros(LENGTH, dtype=torch.float64)
    row_C[list(ids)] = length / math.sqrt(len(ids))
    return row_C


def test_noise_is_as_long_as_the_bos_and_costs_what_it_says():
    """The BOS speaks against the answer by the axis of an id that the text never has."""
    decoder = with_bos_row(speaking({UNUSED: -STRENGTH}), along(UNUSED, length=2.0))
    found = list(probe_in_front(decoder, inputs()))
    assert value(found, "cost_bos") == pytest.approx(cost_of(-2.0 * STRENGTH))
    assert value(found, "bos_length") == pytest.approx(2.0)
    noise_NC = in_front._noise(torch.zeros(LENGTH, dtype=torch.float64))
    share_N = (noise_NC[:, UNUSED] / noise_NC.norm(dim=1)).tolist()
    costs = [cost_of(-2.0 * STRENGTH * share) for share in share_N]
    assert value(found, "cost_noise") == pytest.approx(sum(costs) / len(costs))
    assert value(found, "cost_noise_least") == pytest.approx(min(costs))
    assert value(found, "cost_noise_most") == pytest.approx(max(costs))
    assert value(found, "cost_noise_deviation") > 0.1
    assert len(costs) == 16
    assert min(share_N) < -0.1 and max(share_N) > 0.1, "it points every way"


def test_what_all_tokens_of_text_share():
    """Once the BOS is that, longer; once it is what none has."""
    decoder = speaking({token: -STRENGTH for token in KNOWN})
    found = list(probe_in_front(with_bos_row(decoder, along(*KNOWN, length=3.0)), inputs()))
    assert value(found, "bos_cosine") == pytest.approx(1)
    assert value(found, "cost_shared") == pytest.approx(value(found, "cost_bos"))
    assert abs(value(found, "cost_bos")) > 0.1
    shared = value(found, "cost_shared")
    found = list(probe_in_front(with_bos_row(decoder, along(UNUSED, length=3.0)), inputs()))
    assert value(found, "bos_cosine") == pytest.approx(0)
    assert value(found, "cost_shared") == pytest.approx(shared), "as long, whatever the BOS is"
    assert value(found, "cost_bos") != pytest.approx(shared)


def test_an_id_that_occurs_often_counts_once_in_what_all_share():
    decoder = with_bos_row(speaking(), along(*KNOWN, length=1.0))
    made = inputs()
    made.prompts["text"].tokens_BT[:2] = KNOWN[0]
    assert set(made.prompts["text"].tokens_BT.unique().tolist()) == set(KNOWN)
    assert value(list(probe_in_front(decoder, made)), "bos_cosine") == pytest.approx(1)


def test_long_embeddings_count_by_their_length():
    """One id three times as long as the others, and a BOS against the mean of all."""
    rows_VC = torch.eye(LENGTH, dtype=torch.float64)
    rows_VC[KNOWN[0], KNOWN[0]] = 3.0
    mean_C = rows_VC[list(KNOWN)].mean(dim=0)
    rows_VC[BOS] = -2.0 * mean_C / mean_C.norm() + along(UNUSED, length=2.0)
    decoder = speaking()
    set_weight(decoder.embedding, rows_VC)
    found = list(probe_in_front(decoder, inputs()))
    assert value(found, "bos_cosine") == pytest.approx(-math.sqrt(0.5))
    mean_length = (len(KNOWN) + 2) / len(KNOWN)
    assert value(found, "bos_length") == pytest.approx(math.sqrt(8) / mean_length)


def test_the_model_is_as_it_was(monkeypatch):
    decoder = speaking({4: STRENGTH})
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    list(probe_in_front(decoder, inputs()))
    # And with an error in between.
    monkeypatch.setattr(decoder, "loss", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(probe_in_front(decoder, inputs()))
    assert not decoder.embedding._forward_hooks
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.state_dict().items())
