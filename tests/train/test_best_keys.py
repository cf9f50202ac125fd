"""The best key by class of its token, from masses that are set by hand."""

import torch

from kernels.attention import Statistics
from kernels.masks import DenseMask, IntervalMask
from train.probes.best_keys import best_keys
from train.probes.inputs import TokenClass

T = 64
CLASSES = torch.tensor([TokenClass.other, TokenClass.bos, TokenClass.eos, TokenClass.delimiter])


def statistics(key_mass_BHS):
    nothing_BHT = torch.zeros_like(key_mass_BHS)
    fields = dict.fromkeys(Statistics._fields)
    return Statistics(**(fields | {"first_mass_BHT": nothing_BHT, "key_mass_BHS": key_mass_BHS}))


def masses(causal, **alpha_at):
    """[2, 2, 64]: of two rows and two heads, ``b0h1=(key, alpha)``."""
    queries_BS = causal.queries_per_key_BS()
    mass_BHS = torch.zeros(2, 2, T)
    for place, (key, alpha) in alpha_at.items():
        row, head = int(place[1]), int(place[3])
        mass_BHS[row, head, key] = alpha * queries_BS[row, key]
    return mass_BHS


def found(mass_BHS, mask, class_V, tokens_BT):
    found = best_keys([statistics(mass_BHS)], [mask], class_V, tokens_BT)
    return {name: value_XH for layer, name, value_XH in found if layer == 0}


def test_the_largest_alpha_and_its_class():
    causal = IntervalMask.causal(2, T)
    tokens_BT = torch.zeros(2, T, dtype=torch.int64)
    tokens_BT[:, 0], tokens_BT[0, 9], tokens_BT[1, 20] = 1, 2, 3
    mass_BHS = masses(causal, b0h0=(0, 0.9), b0h1=(9, 0.5), b1h0=(20, 0.31), b1h1=(5, 0.29))
    # Key 40 has more, but 24 queries see it, and it is of the second half.
    mass_BHS[1, 1, 40] = 24 * 0.9
    values = found(mass_BHS, causal, CLASSES, tokens_BT)
    torch.testing.assert_close(values.pop("best_alpha"), torch.tensor([[0.9, 0.5], [0.31, 0.29]]))
    assert {name: value_XH.tolist() for name, value_XH in values.items()} == {
        "best_is_first": [[1, 0], [0, 0]],
        "best_rate_030_other": [[0, 0], [0, 0]],
        "best_rate_030_bos": [[1, 0], [0, 0]],
        "best_rate_030_eos": [[0, 1], [0, 0]],
        "best_rate_030_delimiter": [[0, 0], [1, 0]],
    }
    without = found(mass_BHS, causal, None, tokens_BT)
    assert set(without) == {"best_alpha", "best_is_first"}


def test_keys_that_too_few_queries_see_do_not_count():
    causal = IntervalMask.causal(2, T)
    tokens_BT = torch.ones(2, T, dtype=torch.int64)
    visible_BTS = causal.dense_BTS().clone()
    # 31 queries see key 0 of the first row, and 10 at most any key of the second.
    visible_BTS[0, 31:, 0] = False
    queries_T = torch.arange(T)
    visible_BTS[1] &= queries_T[:, None] - queries_T < 10
    mask = DenseMask(visible_BTS=visible_BTS, document_start_BT=causal.document_start_BT)
    mass_BHS = masses(mask, b0h0=(0, 0.9), b0h1=(3, 0.5), b1h0=(0, 0.9))
    mass_BHS[0, 0, 7] = 0.4 * 57
    values = found(mass_BHS, mask, CLASSES, tokens_BT)
    torch.testing.assert_close(values["best_alpha"], torch.tensor([[0.4, 0.5]]))
    assert values["best_is_first"].tolist() == [[0, 0]]
    assert values["best_rate_030_bos"].tolist() == [[1, 1]]
    narrow = DenseMask(visible_BTS=visible_BTS[1:], document_start_BT=causal.document_start_BT[1:])
    assert found(mass_BHS[1:], narrow, CLASSES, tokens_BT[1:]) == {}
