"""The table over open models: the papers' inputs, and figures by the released formula."""

import math

import numpy as np
import pytest
import torch
import transformers

from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import PackedBatch
from models.decoder import Decoder, DecoderConfig
from models.huggingface import export_huggingface
from tests.huggingface_models import (
    CONFIGS,
    SINK_TOKENS,
    SIZES,
    VOCAB_SIZE,
    byte_tokenizer,
    eager_maps,
    save_model,
    write_texts,
)
from train.metrics import THRESHOLDS
from train.probes.huggingface import (
    HUGGINGFACE_COLUMNS,
    huggingface_sinks,
    load_causal_lm,
    statistics_of,
)
from train.probes.huggingface_prompts import (
    huggingface_prompts,
    huggingface_texts,
    prompts_sha256,
)
from train.probes.inputs import TokenClass
from train.sink_table import threshold_name

ROWS = 10
BYTES = [byte_tokenizer().decode([index]) for index in range(256)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


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


def class_of(index):
    """Of a token of ``byte_tokenizer``: text without letters and digits is ASCII there."""
    character = BYTES[index] if index < 256 else ""
    is_delimiter = character.isascii() and not character.isalnum()
    return {256: "bos", 257: "eos"}.get(index, "delimiter" if is_delimiter else "other")


def check_best_keys(figures, alphas_BLHS, tokens_BT):
    """Of each sample and head the largest alpha of the first half's keys."""
    class_BT = [[class_of(index) for index in row] for row in tokens_BT.tolist()]
    for layer, head in np.ndindex(*alphas_BLHS.shape[1:3]):
        alpha_B, key_B = alphas_BLHS[:, layer, head, :32].max(-1)
        place = (layer, head, -1)
        assert figures["best_alpha", *place] == pytest.approx(alpha_B.mean().item(), abs=1e-5)
        two_BS = alphas_BLHS[:, layer, head, :32].topk(2).values
        if (two_BS[:, 0] - two_BS[:, 1] < 1e-5).any() or ((alpha_B - 0.3).abs() < 1e-5).any():
            continue
        is_first = (key_B == 0).float().mean().item()
        assert figures["best_is_first", *place] == pytest.approx(is_first)
        best_B = [row[key] for row, key in zip(class_BT, key_B.tolist(), strict=True)]
        for kind in TokenClass:
            over = [a > 0.3 and c == kind.name for a, c in zip(alpha_B, best_B, strict=True)]
            rate = figures[f"best_rate_030_{kind.name}", *place]
            assert rate == pytest.approx(sum(over) / len(over))


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
    check_best_keys(figures, alphas_BLHS, tokens_BT)
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
    assert tuple(table) == HUGGINGFACE_COLUMNS
    assert set(table["probe"]) == {"sinks", "norms"} and set(table["model"]) == {"llama"}
    model, tokenizer = load_causal_lm(folder)
    read = huggingface_texts(texts, tmp_path)
    prompts = huggingface_prompts(tokenizer, VOCAB_SIZE, read, ROWS)
    assert set(table["input"]) == set(prompts) == {"text", "bos_text", "random", "repeated"}
    for name in prompts:
        first_BLH = check_table_by_the_released_formula(table, name, prompts[name], folder)
        rates = {(first_BLH > eps).float().mean().item() for eps in THRESHOLDS}
        assert "text" not in name or len(rates) == 5, "no heads between the thresholds"
        check_norms(figures_of(table, name), folder, prompts[name])
    assert set(table["probe_set"]) == {prompts_sha256(prompts)}
    assert set(table["num_prompts"]) == {ROWS}
    of_bos = table.query("name == 'best_rate_030_bos'").groupby("input")["value"].max()
    assert of_bos["bos_text"] > 0.5 and of_bos["text"] == 0
    assert table.query("name == 'best_rate_030_other' and input == 'text'")["value"].max() > 0.5
    # Under rope a token over and over has the same state at every position (2410.10781, app. C).
    norm_LBT = statistics_of(model, prompts["repeated"]).hidden_norm_LBT
    torch.testing.assert_close(norm_LBT, norm_LBT[..., :1].expand_as(norm_LBT))
    again = huggingface_sinks(folder, texts, rows=ROWS, batch_rows=10, cache_dir=tmp_path)
    assert (again["value"] - table["value"]).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_does(texts, tmp_path):
    folder = save_model(tmp_path / "llama", CONFIGS["llama"], byte_tokenizer())
    of_cpu, of_gpu = (
        huggingface_sinks(folder, texts, rows=ROWS, cache_dir=tmp_path, device=device)
        for device in ("cpu", "cuda")
    )
    masses = of_cpu["name"] == "mass"
    difference = (of_cpu["value"] - of_gpu["value"]).abs()
    assert masses.any() and difference[masses].max() < 2e-3
    assert (difference < 2e-3).mean() > 0.99


@torch.no_grad()
def check_norms(figures, folder, tokens_BT):
    """Ratios from transformers' hidden states, and from what the value projections give."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    values = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, inputs, out: values.append(out))
        layer.register_forward_hook(lambda _, inputs, out: hidden.append(out))
    hidden = []
    model(tokens_BT)
    for layer, (hidden_BTC, v_BTX) in enumerate(zip(hidden, values, strict=True)):
        norms = {("hidden_ratio", layer, -1, -1): hidden_BTC.norm(dim=-1)}
        for head, v_BTD in enumerate(v_BTX.split(12, dim=-1)):
            norms["value_ratio", layer, head, -1] = v_BTD.norm(dim=-1)
        for place, norm_BT in norms.items():
            ratio = torch.stack([row[0] / row[1:].mean() for row in norm_BT]).mean().item()
            assert figures[place] == pytest.approx(ratio, rel=1e-4)


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
        loss = decoder.loss(batch).loss / batch.num_labels
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
    masses = mistral[mistral["name"] == "mass"]
    assert set(masses["position"]) == set(range(1, 8)) and -1 not in set(mistral["layer"])
    # Keys there are, but no classes without a tokenizer.
    best = {name for name in mistral["name"] if name.startswith("best_")}
    assert best == {"best_alpha", "best_is_first"}
    assert set(mistral.query("name == 'best_is_first' and input == 'random'")["layer"]) == {0, 1, 2}
    oss = huggingface_sinks(save_model(tmp_path / "oss", CONFIGS["gpt_oss"]), rows=2)
    assert set(oss[(oss["name"] == "mass") & (oss["position"] == 0)]["layer"]) == {-1, 1}
    null = oss[(oss["name"] == "null_mass") & (oss["input"] == "random")]
    assert set(null["layer"]) == {-1, 0, 1, 2} and set(null["position"]) == {-1}
    assert "of_keys_rate_030" in set(oss["name"])


def test_fewer_texts_than_asked_are_told_and_counted(texts, tmp_path, caplog):
    folder = save_model(tmp_path / "llama", CONFIGS["llama"], byte_tokenizer())
    table = huggingface_sinks(folder, texts, rows=30, batch_rows=30, cache_dir=tmp_path)
    counts = table.groupby("input")["num_prompts"].unique().map(list).to_dict()
    # Of 40 texts every third one is too short.
    assert counts == {"text": [26], "bos_text": [26], "random": [30], "repeated": [30]}
    assert "26 prompts of text instead of 30: no more texts have 64 tokens" in caplog.text


def test_a_window_below_32_leaves_only_norms(tmp_path):
    config = transformers.MistralConfig(**SIZES, sliding_window=16)
    table = huggingface_sinks(save_model(tmp_path / "mistral", config), rows=2)
    assert set(table["name"]) == {"hidden_ratio", "value_ratio"}
    assert tuple(table) == HUGGINGFACE_COLUMNS
