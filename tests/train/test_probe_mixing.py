"""Mixing on decoders whose states are linear in their inputs, or all alike.

Axes: B rows, T positions, C width.
"""

import pytest
import torch
from torch.testing import assert_close

from models.overrides import LayerOverride
from tests.train.handmade import (
    LENGTH,
    blank_decoder,
    inputs_of,
    mixing_decoder,
    prompts_of,
    set_weight,
    shifted_tokens,
    value,
    values,
)
from tests.train.test_probe_trace import decoder_of
from train.probes import mixing
from train.probes.mixing import CHANGED, pairwise_cosine, probe_mixing, with_other_token
from train.probes.trace import trace


def mixed_TT(strength, layers, hidden_first=False):
    """(1 + strength A)^layers, A the uniform causal attention (without key 0)."""
    visible_TT = torch.ones(LENGTH, LENGTH).tril().double()
    if hidden_first:
        visible_TT[1:, 0] = 0
    attention_TT = visible_TT / visible_TT.sum(1, keepdim=True)
    return torch.linalg.matrix_power(torch.eye(LENGTH) + strength * attention_TT, layers)


@pytest.mark.parametrize("ending", ["", "_hidden_first"])
def test_a_change_spreads_as_uniform_attention_spreads_it(ending):
    """One-hot ids differ by sqrt(2), and the model is linear."""
    found = list(probe_mixing(mixing_decoder(0.5), inputs_of(text=shifted_tokens())))
    for layer in range(3):
        spread_TT = mixed_TT(0.5, layer + 1, hidden_first=bool(ending))
        expected_T = 2**0.5 * spread_TT[CHANGED:, CHANGED]
        change = values(found, f"perturbation{ending}", layer=layer)
        assert_close(torch.tensor(change).double(), expected_T)
        # Each position holds another id, so its norm is that of its row of the spread.
        relative = values(found, f"perturbation_relative{ending}", layer=layer)
        expected_T = expected_T / spread_TT[CHANGED:].norm(dim=1)
        assert_close(torch.tensor(relative).double(), expected_T)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_jacobian_of_a_linear_model_is_its_matrix(mode):
    """d h_j / d h_i is a number times the identity, whose Frobenius norm is sqrt(C)."""
    decoder, inputs = mixing_decoder(0.5), inputs_of(text=shifted_tokens())
    with mode():
        found = list(probe_mixing(decoder, inputs))
    norm = [value(found, "jacobian_norm", position=i) for i in range(LENGTH)]
    assert_close(torch.tensor(norm).double(), LENGTH**0.5 * mixed_TT(0.5, 3)[-1])


@pytest.mark.parametrize("attention", ["softmax", "sink_token", "softpick"])
def test_the_jacobian_of_any_model_is_that_of_small_differences(monkeypatch, attention):
    """In parts of 7, 7, 7 and 3 of its 24 dimensions."""
    monkeypatch.setattr(mixing, "JACOBIAN_COPIES", 7)
    decoder, tokens_BT, step = decoder_of(attention, num_layers=2), shifted_tokens(1), 1e-5
    found = list(probe_mixing(decoder, inputs_of(text=tokens_BT)))
    norm = [value(found, "jacobian_norm", position=i) for i in range(LENGTH)]

    # A row for each number of h^0 that is changed.
    change_NTC = step * torch.eye(LENGTH * 24).double().view(-1, LENGTH, 24)
    batch = prompts_of(tokens_BT.repeat(len(change_NTC), 1))
    ends = [
        trace(decoder, batch, {0: LayerOverride(input=lambda x, c=c: x + c)}).hidden_BTC[-1][:, -1]
        for c in (change_NTC, -change_NTC)
    ]
    square_N = ((ends[0] - ends[1]) / (2 * step)).square().sum(-1)
    expected_T = square_N.view(LENGTH, 24).sum(1).sqrt()
    assert_close(torch.tensor(norm).double(), expected_T, rtol=1e-6, atol=1e-9)


def test_without_attention_a_change_stays_where_it_is():
    decoder = decoder_of()
    for block in decoder.blocks:
        torch.nn.init.zeros_(block.attention.output.weight)
    found = list(probe_mixing(decoder, inputs_of(text=shifted_tokens())))
    for layer in range(3):
        at, *later = values(found, "perturbation", layer=layer)
        assert at > 0.1 and not any(later)
    norm = values(found, "jacobian_norm")
    assert not any(norm[:-1]) and norm[-1] > 0.1


def test_identical_tokens_have_identical_states():
    """With relative positions a repeated token is the same everywhere (arXiv 2410.10781)."""
    repeated_BT = torch.arange(4)[:, None].repeat(1, LENGTH)
    inputs = inputs_of(text=shifted_tokens(), repeated=repeated_BT)
    found = list(probe_mixing(decoder_of(), inputs))
    for name, expected in (("rank_collapse", 0), ("rank_collapse_later", 0), ("late_cosine", 1)):
        assert values(found, name, input="repeated") == pytest.approx([expected] * 3, abs=1e-9)
        assert all(abs(v - expected) > 0.01 for v in values(found, name, input="text"))


def test_orthogonal_states_are_as_far_from_constant_as_they_can_be():
    """X = 1: ||X - 1 x^T||^2 = T - 1 of T."""
    found = list(probe_mixing(blank_decoder(), inputs_of(text=shifted_tokens())))
    for ending in ("", "_hidden_first"):
        distance = values(found, f"rank_collapse{ending}")
        assert distance == pytest.approx([(15 / 16) ** 0.5] * 3)
        distance = values(found, f"rank_collapse_later{ending}")
        assert distance == pytest.approx([(14 / 15) ** 0.5] * 3)
        assert values(found, f"late_cosine{ending}") == pytest.approx([0] * 3)


def test_a_large_first_state_drowns_the_others_in_one_distance_only():
    """h_0 = 100 e_0, all others e_1 + their id / 10: nearly constant without position 0."""
    decoder = blank_decoder()
    weight_VC = 0.1 * torch.eye(LENGTH)
    weight_VC[:, 1] = 1
    weight_VC[0] = 0
    weight_VC[0, 0] = 100
    set_weight(decoder.embedding, weight_VC)
    found = list(probe_mixing(decoder, inputs_of(text=shifted_tokens(1))))
    assert values(found, "rank_collapse") == pytest.approx([(15 / 16) ** 0.5] * 3, abs=0.01)
    assert max(values(found, "rank_collapse_later")) < 0.11


def test_after_a_bos_the_same_text_token_is_changed():
    """Only the natural prompts have the first key hidden, and a Jacobian."""
    text_BT = shifted_tokens(4)
    bos_text_BT = torch.cat([torch.full((4, 1), 15), text_BT[:, :-1]], 1)
    inputs = inputs_of(trained_with_bos=True, text=text_BT, bos_text=bos_text_BT)
    found = list(probe_mixing(mixing_decoder(0.5), inputs))
    first = {f.input: f.position for f in reversed(found) if f.name == "perturbation"}
    assert first == {"text": CHANGED, "bos_text": CHANGED + 1}
    natural = {f.input for f in found if f.name.endswith("first") or f.name == "jacobian_norm"}
    assert natural == {"bos_text"}


def test_a_changed_token_is_the_next_prompts_that_differs():
    tokens_BT = torch.tensor([[5, 1, 9], [5, 1, 8], [5, 7, 9], [5, 0, 9]])
    batch = prompts_of(tokens_BT)
    changed_BT = with_other_token(batch, 1).tokens_BT
    assert changed_BT.tolist() == [[5, 7, 9], [5, 7, 8], [5, 0, 9], [5, 1, 9]]
    assert with_other_token(batch, 0).tokens_BT[:, 0].tolist() == [4] * 4
    zeros = prompts_of(torch.zeros(2, 3, dtype=torch.int64))
    assert with_other_token(zeros, 1).tokens_BT[:, 1].tolist() == [1, 1]
    assert torch.equal(batch.tokens_BT, tokens_BT)


def test_pairwise_cosine_is_over_different_positions():
    x_BTC = torch.tensor([[[1.0, 0], [0, 3], [-2, 0]], [[1, 1], [2, 2], [3, 3]]])
    assert_close(pairwise_cosine(x_BTC), torch.tensor([-1 / 3, 1]))
