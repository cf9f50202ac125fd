"""Tokenizers: deterministic, special ids where they belong, bytes counted."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from data.corpora import AustenConfig
from data.corpora.austen import AustenCorpus, AustenUnit
from data.corpora.files import FilesCorpus
from data.tokenizers import (
    TOKENIZERS,
    BpeConfig,
    CharactersConfig,
    FileConfig,
    HubTokenizerConfig,
    build_tokenizer,
)
from kernels.errors import UserError

TEXT = "It was “naïve”, <bos> and\n\n 中文 <eos>!"


@pytest.fixture
def corpus(files_config, tmp_path) -> FilesCorpus:
    return FilesCorpus(files_config, tmp_path)


@pytest.fixture
def saved(corpus, tmp_path) -> Path:
    """A tokenizer.json with <bos>, <eos> and <pad>."""
    path = tmp_path / "tokenizer.json"
    build_tokenizer(BpeConfig(vocab_size=300), corpus, tmp_path).save(path)
    return path


def test_training_is_deterministic(files_config, tmp_path):
    """Also in another process, where hashes of strings differ."""
    script = (
        "import sys; from pathlib import Path; from data.corpora import FilesConfig\n"
        "from data.corpora.files import FilesCorpus\n"
        "from data.tokenizers import BpeConfig, build_tokenizer\n"
        "config = FilesConfig(paths=[sys.argv[1]], validation_fraction=0.2)\n"
        "cache = Path(sys.argv[2])\n"
        "corpus = FilesCorpus(config, cache)\n"
        "print(build_tokenizer(BpeConfig(vocab_size=300), corpus, cache).sha256)"
    )
    command = [sys.executable, "-c", script, files_config.paths[0], str(tmp_path / "there")]
    root = Path(__file__).parents[2]
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    here = build_tokenizer(
        BpeConfig(vocab_size=300), FilesCorpus(files_config, tmp_path / "here"), tmp_path / "here"
    )
    assert there.split() == [here.sha256]


def test_cached_tokenizer_is_the_trained_one(corpus, tmp_path, monkeypatch):
    trained = build_tokenizer(BpeConfig(vocab_size=300), corpus, tmp_path)
    monkeypatch.setattr(corpus, "training_texts", lambda: pytest.fail("trained again"))
    cached = build_tokenizer(BpeConfig(vocab_size=300), corpus, tmp_path)
    assert cached.sha256 == trained.sha256


@pytest.mark.parametrize(
    "config", [BpeConfig(vocab_size=300), CharactersConfig()], ids=["bpe", "characters"]
)
def test_special_tokens_are_distinct_and_never_come_from_text(corpus, tmp_path, config):
    tokenizer = build_tokenizer(config, corpus, tmp_path)
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert specials == {0, 1, 2}
    (ids,) = tokenizer.encode_batch(["<bos> a <eos>"])
    assert specials.isdisjoint(ids)
    assert max(ids) < tokenizer.vocab_size


def test_bpe_encodes_any_text_without_loss(corpus, tmp_path):
    tokenizer = build_tokenizer(BpeConfig(vocab_size=300), corpus, tmp_path)
    (ids,) = tokenizer.encode_batch([TEXT])
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.vocab_size == 300
    assert tokenizer.bytes_per_token_V[ids].sum() == len(TEXT.encode())
    assert tokenizer.bytes_per_token_V[:3].tolist() == [0, 0, 0]


def test_characters_are_one_token_each(corpus, tmp_path):
    tokenizer = build_tokenizer(CharactersConfig(), corpus, tmp_path)
    text = "the cat\nwas old."
    known, unknown = tokenizer.encode_batch([text, "中"])
    assert len(known) == len(text) and tokenizer.decode(known) == text
    assert tokenizer.decode(unknown) == "<unk>"
    assert tokenizer.bytes_per_token_V[known].sum() == len(text.encode())
    seen = set().union(*corpus.training_texts())
    assert tokenizer.vocab_size == len(seen) + 4


def test_spelled_vocabularies_count_bytes_too(tmp_path):
    """SentencePiece's way: a mark for a space, and tokens that name a byte."""
    vocab = {"<unk>": 0, "\u2581was": 1, "é": 2, "<0xE4>": 3, "<bos>": 4, "<eos>": 5, "<pad>": 6}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    core.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(FileConfig(path=str(tmp_path / "tokenizer.json")), None, tmp_path)
    assert tokenizer.bytes_per_token_V.tolist() == [1, 4, 2, 1, 0, 0, 0]


def test_a_tokenizer_from_a_file(saved, tmp_path):
    tokenizer = build_tokenizer(FileConfig(path=str(saved)), None, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    shared = FileConfig(path=str(saved), bos="<eos>", pad=None)
    tokenizer = build_tokenizer(shared, None, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1, None)


def test_a_tokenizer_of_the_hub_is_fetched_once(saved, tmp_path, monkeypatch):
    asked = []

    def from_pretrained(name, revision):
        asked.append((name, revision))
        core = tokenizers.Tokenizer.from_file(str(saved))
        core.enable_truncation(4)
        core.enable_padding()
        return core

    hub = SimpleNamespace(from_pretrained=from_pretrained, from_file=tokenizers.Tokenizer.from_file)
    monkeypatch.setattr("data.tokenizers.tokenizers", SimpleNamespace(Tokenizer=hub))
    config = HubTokenizerConfig(name="owner/model", revision="v1")
    for _ in range(2):
        tokenizer = build_tokenizer(config, None, tmp_path)
        short, long = tokenizer.encode_batch(["a", TEXT])
        assert len(short) == 1 and tokenizer.decode(long) == TEXT
    assert asked == [("owner/model", "v1")]


def test_tokenizer_depends_on_the_source_text_alone(tmp_path):
    """Not on how it is cut into documents, nor on which of them are dropped."""
    keys = [
        AustenCorpus(config, tmp_path).training_texts_key
        for config in (
            AustenConfig(),
            AustenConfig(unit=AustenUnit.paragraphs, min_document_tokens=64),
            AustenConfig(validation_fraction=0.1),
        )
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_damaged_cached_tokenizer_is_refused(corpus, tmp_path):
    config = BpeConfig(vocab_size=300)
    build_tokenizer(config, corpus, tmp_path)
    (path,) = (tmp_path / "tokenizers").glob("*.json")
    path.write_text(path.read_text()[:1000])
    with pytest.raises(UserError, match=rf"^cached tokenizer must be intact .* got {path}"):
        build_tokenizer(config, corpus, tmp_path)


def test_every_kind_has_its_config():
    assert len({kind.Config for kind in TOKENIZERS.values()}) == len(TOKENIZERS)
