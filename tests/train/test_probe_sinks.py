"""Sinks, losses and norms of a head that attends to one token, whose figures are known.

The head scores id 0 (the BOS) 20 and every other id 0, so where a prompt begins with the BOS all of
its attention goes there, and it is uniform where there is none.
"""

import math

import pytest
import torch

from models.attention import ATTENTIONS, SoftmaxAttention
from models.batch import IGNORE_LABEL
from models.decoder import Decoder, DecoderConfig
from tests.train.handmade import (
    LENGTH,
    blank_decoder,
    inputs_of,
    set_weight,
    shifted_tokens,
    value,
    values,
)
from train.probes.inputs import TokenClass
from train.probes.losses import probe_losses
from train.probes.norms import probe_norms
from train.probes.sinks import probe_sinks
from train.probes.trace import trace

T = 64
UNIFORM = sum(1 / i for i in range(1, T + 1)) / T
CLASSES = torch.tensor([TokenClass.bos, TokenClass.delimiter] + [TokenClass.other] * (LENGTH - 2))


def bos_seeker(value_norm: float = 0.0, *, num_layers: int = 2):
    """Queries are the same for all tokens; the only key that isn't 0 is that of id 0."""
    decoder = blank_decoder(num_layers=num_layers)
    everything_DC = torch.zeros(LENGTH, LENGTH)
    everything_DC[0] = 20 * LENGTH**0.5
    bos_DC = torch.zeros(LENGTH, LENGTH)
    bos_DC[0, 0] = 1
    for block in decoder.blocks:
        set_weight(block.attention.query, everything_DC)
        set_weight(block.attention.key, bos_DC)
    # Id 0 says that id 1 comes next.
    first = decoder.blocks[0].attention
    set_weight(first.value, value_norm * torch.eye(LENGTH)[0].outer(torch.eye(LENGTH)[0]))
    set_weight(first.output, torch.eye(LENGTH)[1].outer(torch.eye(LENGTH)[0]))
    return decoder


def random_decoder(attention, num_layers=2):
    """Four query and two key heads, weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    config = DecoderConfig(
        num_layers=num_layers, d_model=24, num_heads=4, num_kv_heads=2, d_ff=20, vocab_multiple=1
    )
    decoder = Decoder(config, attention, LENGTH).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.ndim == 1, std=0.3)
    return decoder


def prompts(**tokens_BT):
    inputs = inputs_of(trained_with_bos=True, **tokens_BT)
    inputs.token_class_V.copy_(CLASSES)
    return inputs


def text(rows=3):
    """Ids 2 and up: neither BOS nor delimiter."""
    return 2 + (torch.arange(rows)[:, None] + torch.arange(T)) % (LENGTH - 2)


def bos_text(rows=3):
    return torch.cat([torch.zeros(rows, 1, dtype=torch.int64), text(rows)[:, :-1]], dim=1)


def test_all_mass_on_the_bos_and_a_uniform_head_without():
    inputs = prompts(text=text(), bos_text=bos_text())
    inputs.context.append(inputs.prompts["bos_text"])
    found = list(probe_sinks(bos_seeker(), inputs))
    for name in ("bos_text", "context"):
        assert value(found, "mass", input=name, layer=-1) == pytest.approx(1)
        assert value(found, "rate_080", input=name, layer=-1) == 1
        assert value(found, "rate_020_of_means", input=name, layer=-1) == 1
    assert value(found, "row_mass", input="context", layer=-1) == pytest.approx(1)
    assert value(found, "document_mass", input="context", layer=-1) == pytest.approx(1)
    assert value(found, "mass", input="text", layer=-1) == pytest.approx(UNIFORM)
    assert value(found, "excess", input="text", layer=-1) == pytest.approx(0, abs=1e-7)
    assert value(found, "rate_020", input="text", layer=-1) == 0
    # A head that attends uniformly gives key 5 the mean of 1 / (i + 1) over i >= 5.
    fifth = sum(1 / i for i in range(6, T + 1)) / (T - 5)
    assert values(found, "mass", input="text", position=5) == pytest.approx([fifth] * 2)


def test_which_token_has_the_best_key():
    delimiter_BT = text()
    delimiter_BT[:, 20] = 0
    inputs = prompts(text=delimiter_BT, bos_text=bos_text())
    found = list(probe_sinks(bos_seeker(), inputs))
    for layer in (0, 1):
        where = {"input": "bos_text", "layer": layer}
        assert value(found, "best_is_first", **where) == 1
        assert value(found, "best_rate_030_bos", **where) == 1
        assert value(found, "best_alpha", **where) == pytest.approx(1)
        assert value(found, "best_is_first", input="text", layer=layer) == 0
    # The same token, were it punctuation.
    inputs.token_class_V[0] = TokenClass.delimiter
    found = list(probe_sinks(bos_seeker(), inputs))
    assert values(found, "best_rate_030_delimiter", input="text") == [1, 1]
    assert values(found, "best_rate_030_bos", input="text") == [0, 0]


def test_what_hiding_the_first_key_costs():
    """With the BOS's value v every logit of id 1 is v; hidden, all that is left is the own id's."""
    v, own = 1.5, 1.0
    decoder = bos_seeker(v, num_layers=1)
    set_weight(decoder.unembedding, torch.eye(LENGTH))
    inputs = prompts(text=text(), bos_text=bos_text())
    for batch in inputs.prompts.values():
        batch.labels_BT[:, 1:-1] = 1
    found = list(probe_losses(decoder, inputs))
    rest = LENGTH - 2
    seen = math.log(math.exp(v) + math.exp(own) + rest) - v
    hidden = math.log(math.exp(own) + rest + 1)
    assert value(found, "loss", input="bos_text") == pytest.approx(seen)
    assert value(found, "loss_hidden_first", input="bos_text") == pytest.approx(hidden)
    assert value(found, "cost_hidden_first", input="bos_text") == pytest.approx(hidden - seen)
    assert value(found, "loss", input="text") == pytest.approx(hidden)
    assert value(found, "cost_hidden_first", input="text") == pytest.approx(0, abs=1e-12)
    assert value(found, "cost_without_bos") == pytest.approx(hidden - seen)
    assert (inputs.prompts["text"].labels_BT == IGNORE_LABEL).any()


def test_angles_and_entropy_of_a_head_on_the_bos():
    found = list(probe_norms(bos_seeker(), prompts(text=shifted_tokens()[:1], bos_text=bos_text())))
    assert values(found, "cosine_first", input="bos_text") == pytest.approx([1, 1])
    assert values(found, "cosine_others", input="bos_text") == pytest.approx([0, 0])
    norm = 20 * LENGTH**0.5 * (1 / LENGTH**0.5) * LENGTH**0.5
    assert values(found, "product_first", input="bos_text") == pytest.approx([norm, norm])
    assert max(values(found, "entropy_share", input="bos_text")) < 1e-6
    # One-hot states all have norm 1; of 64 * 16 entries 64 are 1, the median 0.
    assert value(found, "hidden_ratio_embedding", input="bos_text") == pytest.approx(1)
    p = 1 / LENGTH
    kurtosis = (1 - 6 * p * (1 - p)) / (p * (1 - p))
    assert value(found, "kurtosis_embedding", input="bos_text") == pytest.approx(kurtosis)


@pytest.mark.parametrize("window", [1, 3, None])
def test_entropy_is_over_what_a_query_sees(window):
    """Zero queries attend uniformly, whatever their window."""
    decoder = blank_decoder(attention=SoftmaxAttention.Config(window=window))
    found = list(probe_norms(decoder, prompts(text=text())))
    shares = values(found, "entropy_share", input="text")
    assert shares == pytest.approx([0.0 if window == 1 else 1.0] * 3)


def test_angles_are_of_what_a_query_sees_with_its_own_groups_keys():
    """Written out with loops, for two key heads of four query heads and a window."""
    decoder = random_decoder(SoftmaxAttention.Config(window=5), num_layers=1)
    inputs = prompts(text=text(rows=1)[:, :9])
    found = list(probe_norms(decoder, inputs))
    run = trace(decoder, inputs.prompts["text"])
    for head in range(4):
        q_TD, k_TD = run.q_BTHD[0][0, :, head], run.k_BTGD[0][0, :, head // 2]
        pairs = [(i, j) for i in range(9) for j in range(max(1, i - 4), i + 1)]
        cosines = [torch.cosine_similarity(q_TD[i], k_TD[j], dim=0).item() for i, j in pairs]
        ours = value(found, "cosine_others", layer=0, head=head)
        assert ours == pytest.approx(sum(cosines) / len(pairs))
        firsts = [(q_TD[i].norm() * k_TD[0].norm()).item() for i in range(1, 5)]
        assert value(found, "product_first", layer=0, head=head) == pytest.approx(sum(firsts) / 4)


VARIANTS = {
    **{name: kind.Config() for name, kind in ATTENTIONS.items()},
    "hybrid": SoftmaxAttention.Config(window=8, global_every=2),
    "window": SoftmaxAttention.Config(window=40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_decoder_has_finite_findings_once(name):
    decoder = random_decoder(VARIANTS[name])
    inputs = prompts(text=text(rows=2), bos_text=bos_text(rows=2))
    inputs.context.append(inputs.prompts["text"])
    for batch in inputs.prompts.values():
        batch.labels_BT[:, 1:-1] = batch.tokens_BT[:, 2:]
    for probe in (probe_sinks, probe_losses, probe_norms):
        found = list(probe(decoder, inputs))
        assert all(math.isfinite(one.value) for one in found)
        keys = [one._replace(value=0.0) for one in found]
        assert len(set(keys)) == len(keys) > 0


def test_norms_of_a_large_first_token_with_a_small_value():
    decoder = blank_decoder(num_layers=1)
    embedding_VC = torch.eye(LENGTH)
    embedding_VC[0] *= 30
    set_weight(decoder.embedding, embedding_VC)
    attention = decoder.blocks[0].attention
    set_weight(attention.value, torch.diag(torch.tensor([0.01] + [1.0] * (LENGTH - 1))))
    set_weight(attention.key, torch.eye(LENGTH))
    found = list(probe_norms(decoder, prompts(text=text(), bos_text=bos_text())))
    assert value(found, "hidden_ratio_embedding", input="bos_text") == pytest.approx(30)
    assert value(found, "key_ratio", input="bos_text") == pytest.approx(30)
    assert value(found, "value_ratio", input="bos_text") == pytest.approx(0.3)
    # Zero queries: uniform attention.
    assert value(found, "entropy_share", input="text") == pytest.approx(1)
