"""Hugging Face models through our attention: transformers' own attention maps are the reference."""

import json
import sys
from functools import cache

import pytest
import torch
import transformers
from torch import nn

from kernels.errors import UserError
from kernels.masks import DenseMask, IntervalMask
from tests.huggingface_models import (
    CONFIGS,
    NUM_TOKENS,
    SIZES,
    VOCAB_SIZE,
    eager_maps,
    random_tokens,
    save_model,
)
from train.probes import huggingface_attention
from train.probes.huggingface import load_causal_lm, statistics_of

WINDOWS = {"mistral": [40, 40, 40], "gpt_oss": [40, 64, 40]}
"""Queries that see a key in each layer, where the row's end doesn't cut them off."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``folder_of("llama")``: a model of ``CONFIGS``, saved once."""
    return cache(lambda name: save_model(tmp_path_factory.mktemp(name), CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_and_logits_equal_those_of_transformers(folder_of, name):
    tokens_BT = random_tokens()
    model, _ = load_causal_lm(folder_of(name))
    record = statistics_of(model, tokens_BT)
    maps_LBHTS, eager = eager_maps(folder_of(name), tokens_BT)
    torch.testing.assert_close(record.logits_BTV, eager.logits, rtol=0, atol=2e-4)
    assert maps_LBHTS[..., 20:, 0].std() > 0.05, "the attention is too uniform to tell"
    for layer, statistics in enumerate(record.statistics):
        maps_BHTS = maps_LBHTS[layer]
        window = WINDOWS.get(name, [NUM_TOKENS] * 3)[layer]
        queries_S = torch.arange(NUM_TOKENS, 0, -1).clamp(max=window)
        assert isinstance(record.masks[layer], IntervalMask)
        torch.testing.assert_close(record.masks[layer].queries_per_key_BS()[3], queries_S)
        alpha_BHS = statistics.key_mass_BHS / queries_S
        torch.testing.assert_close(alpha_BHS, maps_BHTS.sum(2) / queries_S, rtol=0, atol=1e-5)
        close = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(statistics.first_mass_BHT, maps_BHTS[..., 0], **close)
        entropy_BHT = torch.special.entr(maps_BHTS).sum(-1)
        if name == "gpt_oss":
            null_BHT = 1 - maps_BHTS.sum(-1)
            assert null_BHT.mean() > 0.05, "the slots take nothing"
            torch.testing.assert_close(statistics.null_mass_BHT, null_BHT, **close)
            entropy_BHT += torch.special.entr(null_BHT.clamp(min=0))
        else:
            assert statistics.null_mass_BHT is None
        torch.testing.assert_close(statistics.entropy_BHT, entropy_BHT, rtol=0, atol=1e-3)


def test_hidden_norms_are_those_after_each_block_before_the_last_norm(folder_of):
    tokens_BT = random_tokens(2)
    model, _ = load_causal_lm(folder_of("llama"))
    record = statistics_of(model, tokens_BT)
    _, eager = eager_maps(folder_of("llama"), tokens_BT)
    expected = torch.stack(eager.hidden_states[1:-1]).norm(dim=-1)
    torch.testing.assert_close(record.hidden_norm_LBT[:-1], expected, rtol=1e-4, atol=1e-4)
    last = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    statistics_of(model, tokens_BT)
    handle.remove()
    torch.testing.assert_close(record.hidden_norm_LBT[-1], last[0].norm(dim=-1))
    assert record.value_norms[2].shape == (2, NUM_TOKENS, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Gemma2Config(**SIZES), "got Gemma2Attention with softcap 50.0"),
        (
            transformers.FalconConfig(
                vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=2, num_attention_heads=4
            ),
            "must be a model that attends through transformers' attention interface",
        ),
        (
            transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=48, n_layer=2, n_head=4),
            "must be a model that attends through transformers' attention interface",
        ),
    ],
    ids=["gemma2", "falcon", "bloom"],
)
def test_what_our_attention_cannot_compute_is_refused(tmp_path, config, message):
    folder = save_model(tmp_path, config)
    with pytest.raises(UserError, match=message):
        statistics_of(load_causal_lm(folder)[0], random_tokens(1))
    assert huggingface_attention._current.get() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_bias": torch.ones(1, 4, 8, 8)}, "position_bias of shape \\(1, 4, 8, 8\\)"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"attention_mask": None}, "no mask"),
        ({"attention_mask": torch.zeros(2, 4, 8, 8)}, "a mask of shape"),
        ({"attention_mask": torch.full((2, 1, 8, 8), -1.0)}, "a bias in its mask"),
        ({"key_BGSD": torch.zeros(2, 2, 9, 16)}, "8 queries and 9 keys"),
    ],
    ids=["bias", "dropout", "no mask", "by head", "alibi", "cache"],
)
def test_arguments_that_change_attention_are_refused_with_the_layer_type(change, message):
    q_BHTD, k_BGSD = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 8, 16)
    arguments = {
        "query_BHTD": q_BHTD,
        "key_BGSD": k_BGSD,
        "value_BGSE": k_BGSD,
        "attention_mask": torch.ones(8, 8).tril().log().clamp(min=torch.finfo().min)[None, None],
        "sliding_window": 4,
    }
    out_BTHE, weights = huggingface_attention._attend(nn.Linear(1, 1), **arguments)
    assert out_BTHE.shape == (2, 8, 4, 16) and weights is None
    with pytest.raises(UserError, match=f"got Linear with {message}"):
        huggingface_attention._attend(nn.Linear(1, 1), **(arguments | change))


def test_layers_that_do_not_attend_through_the_interface_are_counted(folder_of):
    model, _ = load_causal_lm(folder_of("llama"))
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="with 0 calls in 3 layers"):
        statistics_of(model, random_tokens(1))


def test_nothing_is_kept_outside_of_statistics_of(folder_of):
    model, _ = load_causal_lm(folder_of("llama"))
    tokens_BT = random_tokens(2)
    with torch.no_grad():
        plain = model(tokens_BT).logits
    record = statistics_of(model, tokens_BT)
    torch.testing.assert_close(plain, record.logits_BTV)
    assert len(statistics_of(model, tokens_BT).statistics) == 3
    assert not any(module._forward_hooks for module in model.modules())
    assert huggingface_attention._current.get() is None


def test_masks_are_intervals_where_they_can_be():
    causal = torch.ones(1, 70, 70).tril().bool()
    assert huggingface_attention.mask_of_visible(causal).is_causal
    chunks = causal & (torch.arange(70)[:, None] // 32 == torch.arange(70) // 32)
    mask = huggingface_attention.mask_of_visible(chunks)
    assert isinstance(mask, IntervalMask) and torch.equal(mask.dense_BTS(), chunks)
    hidden = causal.clone()
    hidden[:, 5:, 3] = False
    hidden[:, 9] = False
    hidden[:, 60:69, :9] = False
    hidden[:, 69, 1::2] = False
    mask = huggingface_attention.mask_of_visible(hidden)
    assert isinstance(mask, DenseMask) and torch.equal(mask.dense_BTS(), hidden)


def test_folders_that_cannot_be_used_end_in_one_line(folder_of, tmp_path, monkeypatch):
    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            load_causal_lm(tmp_path)
        assert "\n" not in str(error.value)

    refused("hf must be a folder with config.json")
    config = json.loads((folder_of("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    refused("hf must be a folder with \\*.safetensors \\(pickled weights are not opened\\)")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"damaged")
    refused("hf must be a causal LM that transformers can load by itself")
    weights.write_bytes((folder_of("llama") / "model.safetensors").read_bytes())
    assert load_causal_lm(tmp_path)[1] is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused("hf must hold every weight of its model, got .* without model.layers.3")
    theirs = {"model_type": "own", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config | theirs))
    (tmp_path / "m.py").write_text("raise SystemExit('code of the folder was run')")
    refused("hf must be a causal LM that transformers can load by itself")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("hf needs the package transformers")
