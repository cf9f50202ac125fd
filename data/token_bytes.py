"""How many bytes of text each token of a tokenizer stands for, to give losses in bits a byte."""

from __future__ import annotations

import json
import re

import numpy as np
import tokenizers

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_MARK = "\u2581"


def bytes_per_token(core: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 [V]: UTF-8 bytes of each token's text; special tokens 0, an unknown token 1."""
    serialised = json.loads(core.to_str())
    parts = json.dumps([serialised["pre_tokenizer"], serialised["decoder"]])
    # Byte-level vocabularies write each byte as one character.
    count = len if '"ByteLevel"' in parts else _spelled_bytes
    bytes_V = np.zeros(vocab_size, np.int64)
    for token, index in core.get_vocab(with_added_tokens=False).items():
        bytes_V[index] = count(token)
    for index, token in core.get_added_tokens_decoder().items():
        bytes_V[index] = 0 if token.special else len(token.content.encode())
    unknown = core.token_to_id(getattr(core.model, "unk_token", None) or "")
    if unknown is not None:
        bytes_V[unknown] = 1
    return bytes_V


def _spelled_bytes(token: str) -> int:
    """Bytes of a token that spells its text, SentencePiece's marks resolved."""
    if _BYTE_FALLBACK.fullmatch(token):
        return 1
    return len(token.replace(_WORD_MARK, " ").encode())
