"""What Hugging Face models are measured on: the papers' inputs, and the classes of their tokens."""

import string

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from kernels.errors import UserError
from tests.huggingface_models import byte_tokenizer, write_texts
from train.probes.huggingface_prompts import (
    huggingface_prompts,
    huggingface_texts,
    huggingface_token_classes,
    prompts_sha256,
)
from train.probes.inputs import TokenClass


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


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
    assert prompts_sha256(again) == prompts_sha256(prompts) != prompts_sha256(other)
    assert len(prompts_sha256(prompts)) == 16
    with pytest.raises(UserError, match="texts must hold a text of at least 64 tokens, got 5"):
        huggingface_prompts(tokenizer, 258, ["short"], 5)
    with pytest.raises(UserError, match="ids are below the model's 50, in text, got"):
        huggingface_prompts(tokenizer, 50, [texts.read_text()], 5)


def names_of(class_V):
    return [TokenClass(value).name for value in class_V.tolist()]


def test_classes_of_tokens():
    classes = names_of(huggingface_token_classes(byte_tokenizer(), 260))
    characters = [byte_tokenizer().decode([index]) for index in range(256)]
    delimiters = {
        text for text, name in zip(characters, classes, strict=False) if name == "delimiter"
    }
    # The bytes from 128 on are parts of characters.
    assert delimiters == {chr(byte) for byte in range(128)} - set(
        string.ascii_letters + string.digits
    )
    assert classes[256:] == ["bos", "eos", "other", "other"]
    assert set(classes[:256]) == {"delimiter", "other"}
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<bos>"
    assert huggingface_token_classes(tokenizer, 257)[256] == TokenClass.bos
    # A decoder that takes a first space away.
    core = Tokenizer(models.BPE({"\u2581": 0, "\u2581the": 1, "</s>": 2, "<pad>": 3, "-": 4}, []))
    core.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>"
    )
    assert tokenizer.decode([0]) == ""
    expected = ["delimiter", "other", "eos", "other", "delimiter"]
    assert names_of(huggingface_token_classes(tokenizer, 5)) == expected


def test_the_default_texts_are_held_out_paragraphs(cache_dir):
    texts = list(huggingface_texts(None, cache_dir))
    assert len(texts) > 300
    assert sum(len(text) > 64 * 5 for text in texts) > 100
    assert not any("\n\n" in text for text in texts)
