"""The table over open models: the papers' inputs, and figures by the released formula."""

import json
import math

import numpy as np
import pytest
import torch

from kernels.errors import UserError
from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import PackedBatch
from models.decoder import Decoder, DecoderConfig
from models.huggingface import export_huggingface
from tests.huggingface_models import (
    CONFIGS,
    SINK_TOKENS,
    VOCAB_SIZE,
    byte_tokenizer,
    eager_maps,
    save_model,
)
from train.metrics import THRESHOLDS
from train.module import summed_cross_entropy
from train.probes.huggingface import (
    huggingface_prompts,
    huggingface_sinks,
    huggingface_texts,
    load_causal_lm,
    statistics_of,
)
from train.sink_table import threshold_name

ROWS = 10


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path):
    """A jsonl file of texts, every third one too short."""
    path = tmp_path / "texts.jsonl"
    lines = [
        f"{n} it is a truth universally acknowledged, " * (3 if n % 3 else 1) for n in range(40)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def released_alphas(maps_LBHTS):
    """[B, L, H, S], as the released code of arXiv 2410.10781 goes: a sample at a time, each key's
    mean over the queries from itself on. (It runs in bf16, here it is fp32.)"""
    samples = []
    for sample in range(maps_LBHTS.shape[1]):
        maps_LHTS = maps_LBHTS[:, sample]
        keys = [maps_LHTS[:, :, key:, key].mean(-1) for key in range(maps_LHTS.shape[-1])]
        samples.append(torch.stack(keys, -1))
    return torch.stack(samples)


def figures_of(table, name):
    """{(name, layer, head, position): value} of one input."""
    table = table[table["input"] == name]
    keys = zip(*(table[column] for column in ("name", "layer", "head", "position")), strict=True)
    figures = dict(zip(keys, table["value"], strict=True))
    assert len(figures) == len(table), "a figure is there twice"
    return figures


def check_table_by_the_released_formula(table, name, tokens_BT, folder):
    """Every figure of one input against the formula on the same token ids."""
    figures = figures_of(table, name)
    alphas_BLHS = released_alphas(eager_maps(folder, tokens_BT)[0])
    for layer, head, key in np.ndindex(*alphas_BLHS.shape[1:3], 8):
        alpha_B = alphas_BLHS[:, layer, head, key]
        mass = figures["mass", layer, head, key]
        assert mass == pytest.approx(alpha_B.mean().item(), abs=1e-5)
        for eps in THRESHOLDS:
            if ((alpha_B - eps).abs() > 1e-5).all():
                rate = figures[f"rate_{threshold_name(eps)}", layer, head, key]
                assert rate == pytest.approx((alpha_B > eps).float().mean().item())
    whole = (-1, -1, 0)
    first_BLH = alphas_BLHS[..., 0]
    assert figures["mass", *whole] == pytest.approx(first_BLH.mean().item(), abs=1e-5)
    for eps in THRESHOLDS:
        # The paper's Sink_1: each sample's share of heads, averaged over samples.
        rates = [(sample_LH > eps).float().mean().item() for sample_LH in first_BLH]
        near = ((first_BLH - eps).abs() <= 1e-5).float().mean().item()
        rate = figures[f"rate_{threshold_name(eps)}", *whole]
        assert rate == pytest.approx(sum(rates) / len(rates), abs=near + 1e-6)
        means_LH = first_BLH.mean(0)
        if ((means_LH - eps).abs() > 1e-5).all():
            of_means = figures[f"rate_{threshold_name(eps)}_of_means", *whole]
            assert of_means == pytest.approx((means_LH > eps).float().mean().item())
    return first_BLH


def test_the_table_of_a_llama_equals_the_released_formula(texts, tmp_path):
    folder = save_model(tmp_path / "llama", CONFIGS["llama"], byte_tokenizer())
    table = huggingface_sinks(folder, texts, rows=ROWS, batch_rows=4, cache_dir=tmp_path)
    assert list(table) == ["probe", "name", "input", "layer", "head", "position", "value"]
    assert set(table["probe"]) == {"sinks"}
    model, tokenizer = load_causal_lm(folder)
    read = huggingface_texts(texts, tmp_path)
    prompts = huggingface_prompts(tokenizer, VOCAB_SIZE, read, ROWS)
    assert set(table["input"]) == set(prompts) == {"text", "bos_text", "random", "repeated"}
    for name in prompts:
        first_BLH = check_table_by_the_released_formula(table, name, prompts[name], folder)
        rates = {(first_BLH > eps).float().mean().item() for eps in THRESHOLDS}
        assert "text" not in name or len(rates) == 5, "no heads between the thresholds"
    # Under rope a token over and over has the same state at every position (2410.10781, app. C).
    norm_LBT = statistics_of(model, prompts["repeated"]).hidden_norm_LBT
    torch.testing.assert_close(norm_LBT, norm_LBT[..., :1].expand_as(norm_LBT))
    again = huggingface_sinks(folder, texts, rows=ROWS, batch_rows=10, cache_dir=tmp_path)
    assert (again["value"] - table["value"]).abs().max() < 1e-6


def trained_decoder(steps=60):
    """A decoder that was trained to repeat a row's first token, a digit, at every letter."""
    torch.manual_seed(0)
    config = DecoderConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=32)
    decoder = Decoder(config, SoftmaxAttention.Config(), vocab_size=258)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.02)
    document_BT = torch.ones(16, 64, dtype=torch.int32)
    losses = []
    for _ in range(steps):
        tokens_BT = torch.randint(64, 90, (16, 64))
        tokens_BT[:, 0] = torch.tensor(SINK_TOKENS)[torch.randint(10, (16,))]
        batch = PackedBatch(
            tokens_BT=tokens_BT,
            labels_BT=tokens_BT[:, :1].expand(-1, 64),
            positions_BT=torch.arange(64).expand(16, -1),
            document_BT=document_BT,
            begins_BT=document_BT == 1,
            mask=IntervalMask.from_documents(document_BT),
            num_labels=torch.tensor(16 * 64),
        )
        loss = summed_cross_entropy(decoder(batch).logits_BTV, batch.labels_BT) / batch.num_labels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * math.log(10), "the decoder learnt nothing"
    return decoder


def test_the_table_of_a_trained_and_exported_decoder(texts, tmp_path):
    folder = tmp_path / "exported"
    export_huggingface(trained_decoder(), folder)
    byte_tokenizer().save_pretrained(folder)
    table = huggingface_sinks(folder, texts, rows=ROWS, cache_dir=tmp_path)
    read = huggingface_texts(texts, tmp_path)
    prompts = huggingface_prompts(load_causal_lm(folder)[1], 258, read, ROWS)
    for name in prompts:
        first_BLH = check_table_by_the_released_formula(table, name, prompts[name], folder)
        assert name != "text" or 0 < (first_BLH > 0.3).float().mean() < 1


def test_a_window_below_64_leaves_the_first_key_out_and_a_slot_has_its_own_names(tmp_path, caplog):
    mistral = huggingface_sinks(save_model(tmp_path / "mistral", CONFIGS["mistral"]), rows=2)
    assert set(mistral["input"]) == {"random", "repeated"} and "no tokenizer" in caplog.text
    assert set(mistral["position"]) == set(range(1, 8)) and -1 not in set(mistral["layer"])
    oss = huggingface_sinks(save_model(tmp_path / "oss", CONFIGS["gpt_oss"]), rows=2)
    assert set(oss[(oss["name"] == "mass") & (oss["position"] == 0)]["layer"]) == {-1, 1}
    null = oss[(oss["name"] == "null_mass") & (oss["input"] == "random")]
    assert set(null["layer"]) == {-1, 0, 1, 2} and set(null["position"]) == {-1}
    assert "of_keys_rate_030" in set(oss["name"])


def test_prompts_are_the_papers_inputs(texts, tmp_path):
    tokenizer = byte_tokenizer()
    prompts = huggingface_prompts(tokenizer, 258, huggingface_texts(texts, tmp_path), 5)
    assert {name: tuple(tokens.shape) for name, tokens in prompts.items()} == {
        name: (5, 64) for name in ("text", "bos_text", "random", "repeated")
    }
    # Texts 0 and 3 are too short.
    expected = ["1 it is a", "2 it is a", "4 it is a", "5 it is a", "7 it is a"]
    assert [tokenizer.decode(ids)[:9] for ids in prompts["text"]] == expected
    assert (prompts["bos_text"][:, 0] == 256).all()
    assert torch.equal(prompts["bos_text"][:, 1:], prompts["text"][:, :-1])
    assert (prompts["repeated"] == prompts["repeated"][:, :1]).all()
    assert prompts["repeated"][:, 0].unique().numel() > 1
    drawn = huggingface_prompts(tokenizer, 258, [texts.read_text()], 200)["random"]
    assert drawn.unique().tolist() == list(range(256)), "all but the special tokens"
    again = huggingface_prompts(tokenizer, 258, huggingface_texts(texts, tmp_path), 5)
    assert all(torch.equal(again[name], tokens) for name, tokens in prompts.items())
    other = huggingface_prompts(tokenizer, 258, huggingface_texts(texts, tmp_path), 5, seed=1)
    assert not torch.equal(other["random"], prompts["random"])

    tokenizer.bos_token = None
    assert "bos_text" not in huggingface_prompts(tokenizer, 258, [texts.read_text()], 5)
    with pytest.raises(UserError, match="texts must hold a text of at least 64 tokens, got 5"):
        huggingface_prompts(tokenizer, 258, ["short"], 5)
    with pytest.raises(UserError, match="ids are below the model's 50, in text, got"):
        huggingface_prompts(tokenizer, 50, [texts.read_text()], 5)


def test_the_default_texts_are_held_out_paragraphs(cache_dir):
    texts = list(huggingface_texts(None, cache_dir))
    assert len(texts) > 300
    assert sum(len(text) > 64 * 5 for text in texts) > 100
    assert not any("\n\n" in text for text in texts)
