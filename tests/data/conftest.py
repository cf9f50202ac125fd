"""A small corpus of files, and data modules over it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data.corpora import FilesConfig
from data.module import TokenDataModule
from data.packing import PackingConfig
from data.tokenizers import BpeConfig, TokenizerConfig

WORDS = ["the", "a", "cat", "dog", "sees", "likes", "old", "house", "tree", "and", "under", "was"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 5 to 120 words, no two alike."""
    rng = random.Random(seed)
    return [
        f"{index}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 120))) + ".\n"
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """120 texts as jsonl."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(120)))
    return path


@pytest.fixture
def files_config(corpus_file) -> FilesConfig:
    return FilesConfig(paths=[str(corpus_file)], validation_fraction=0.2)


@pytest.fixture
def make_module(files_config, cache_dir) -> Callable[..., TokenDataModule]:
    """``make_module(PackingConfig(...), tokenizer=..., ...)``: a data module over the corpus."""

    def make(
        packing: PackingConfig, tokenizer: TokenizerConfig | None = None, **settings
    ) -> TokenDataModule:
        settings = {"corpus": files_config, "cache_dir": cache_dir} | settings
        tokenizer = tokenizer or BpeConfig(vocab_size=300)
        return TokenDataModule(tokenizer=tokenizer, packing=packing, **settings)

    return make
