"""What Hugging Face models are measured on: 64-token prompts, and what their tokens are.

    text       the first 64 tokens of texts, special ones left out
    bos_text   the BOS and the first 63 of the same; only for a tokenizer with a BOS
    random     64 tokens drawn alike from the vocabulary without special tokens
    repeated   one such token 64 times, another one in each prompt

These are arXiv 2410.10781's (its table over open models).

Axes: B rows, T positions, V token ids.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpora.austen import AustenConfig, AustenCorpus, AustenUnit
from data.corpora.reading import read_file
from data.documents import Split
from kernels.errors import require
from train.metrics import HORIZON
from train.probes.inputs import TokenClass

log = logging.getLogger(__name__)

VERSION = 1
"""Of how prompts are made from texts; raised when that changes."""

_REPLACED = "\N{REPLACEMENT CHARACTER}"
"""What stands for a part of a character."""


def huggingface_texts(path: Path | str | None, cache_dir: Path) -> Iterator[str]:
    """The texts of a jsonl or parquet file with a field ``text``; None: held-out Austen paragraphs.

    Raises ``UserError`` if the file can't be read.
    """
    if path is not None:
        rule = "texts must be a file of texts that can be read"
        yield from read_file(Path(path).expanduser(), "text", cache_dir, rule=rule)
        return
    for document in AustenCorpus(AustenConfig(unit=AustenUnit.paragraphs), cache_dir).documents():
        if document.split is Split.validation:
            yield document.text


def huggingface_prompts(
    tokenizer: Any | None, vocab_size: int, texts: Iterable[str], rows: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """The inputs of the module by name, int64 [B, 64] on the CPU.

    tokenizer: None leaves out the inputs of text. vocab_size: of the model, whose embedding may
    have rows that no token of the tokenizer uses. rows: prompts of each input; those of text are of
    the first texts that have 64 tokens, and fewer, with a warning, where fewer texts have.

    Raises ``UserError`` if no text has 64 tokens, or the model lacks a token of the prompts.
    """
    require(rows >= 1, "rows", "must be >= 1", rows)
    prompts = {}
    drawn = np.arange(vocab_size)
    if tokenizer is not None:
        text_BT = _text_tokens(tokenizer, texts, rows)
        prompts["text"] = text_BT
        if tokenizer.bos_token_id is not None:
            bos_B1 = torch.full((len(text_BT), 1), tokenizer.bos_token_id)
            prompts["bos_text"] = torch.cat([bos_B1, text_BT[:, :-1]], dim=1)
        for name, tokens_BT in prompts.items():
            largest = int(tokens_BT.max())
            rule = f"must be of a tokenizer whose ids are below the model's {vocab_size}, in {name}"
            require(largest < vocab_size, "hf", rule, largest)
        drawn = np.setdiff1d(drawn[: len(tokenizer)], tokenizer.all_special_ids)
    generator = np.random.default_rng(seed)
    prompts["random"] = torch.from_numpy(generator.choice(drawn, (rows, HORIZON)))
    repeated_B1 = torch.from_numpy(generator.choice(drawn, (rows, 1)))
    prompts["repeated"] = repeated_B1.repeat(1, HORIZON)
    return prompts


def _text_tokens(tokenizer: Any, texts: Iterable[str], rows: int) -> Tensor:
    found = []
    longest = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) >= HORIZON:
            found.append(ids[:HORIZON])
        if len(found) == rows:
            break
    require(bool(found), "texts", f"must hold a text of at least {HORIZON} tokens", longest)
    if len(found) < rows:
        message = "%d prompts of text instead of %d: no more texts have %d tokens"
        log.warning(message, len(found), rows, HORIZON)
    return torch.tensor(found)


def prompts_sha256(prompts: Mapping[str, Tensor]) -> str:
    """16 hex digits over the version and every token id: equal ones were measured alike."""
    digest = hashlib.sha256(f"probe set {VERSION}".encode())
    for name, tokens_BT in prompts.items():
        digest.update(f"{name} {tuple(tokens_BT.shape)}".encode())
        digest.update(tokens_BT.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def huggingface_token_classes(tokenizer: Any, vocab_size: int) -> Tensor:
    """int64 [V]: the ``TokenClass`` of each id below the model's ``vocab_size``.

    A delimiter is text without a letter or digit; a part of a character is none, nor is a special
    token other than BOS and EOS. A tokenizer whose EOS is its BOS calls it bos.
    """
    class_V = torch.full((vocab_size,), int(TokenClass.other))
    for index in set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        # No text is left of a lone space where a decoder takes the first one away.
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        is_text = _REPLACED not in text and not any(map(str.isalnum, text))
        if is_text and index < vocab_size:
            class_V[index] = TokenClass.delimiter
    kinds = (TokenClass.eos, tokenizer.eos_token_id), (TokenClass.bos, tokenizer.bos_token_id)
    for kind, index in kinds:
        if index is not None and index < vocab_size:
            class_V[index] = kind
    return class_V
