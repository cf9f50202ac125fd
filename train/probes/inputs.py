"""What probes run on: prompts and rows of held-out text, the same for every checkpoint of a run.

    text       the first 64 tokens of pieces of held-out documents
    bos_text   the BOS and the first 63 of the same
    eos_text   the EOS and the first 63 of the same, if it isn't the BOS: what stands before a
               document's first token in packed rows, and so known to models that never saw a BOS
    random     64 tokens drawn alike from the tokenizer's text tokens
    repeated   one such token 64 times, another one in each prompt
    written    the prompts of ``text`` with what packing writes into rows (a fixed token, random
               ones), where it does
    row_...    text, bos_text and eos_text of the run's context instead of 64 tokens, up to 16; for
               losses alone, which are of text after text there, as a paper's validation loss is
    context    held-out rows, packed as the run packs them

Random and repeated tokens are arXiv 2410.10781's (table 1), which has no BOS in front of them.

Axes: B rows, T positions, V token ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from data.evaluation import ProbeKind
from data.module import TokenDataModule
from data.packing import BosKind
from data.tokenizers import TextTokenizer
from kernels.errors import require
from models.batch import IGNORE_LABEL, PackedBatch
from train.metrics import HORIZON
from train.probes.base import ProbeInputs

VERSION = 3
"""Of how a probe set is made from held-out text; raised when that changes."""

LONG_ROWS = 16
"""Rows of the context's length, at most."""

SEED = 2410_10781
"""Of the random and repeated tokens."""


class TokenClass(IntEnum):
    """What a token is, for the question which tokens become sinks.

    delimiter: text without a letter or digit (punctuation, white space, line ends); a part of a
    character's bytes is none.
    """

    other = 0
    bos = 1
    eos = 2
    delimiter = 3


def token_classes(tokenizer: TextTokenizer) -> Tensor:
    """int64 [V]: the ``TokenClass`` of each id; a tokenizer whose EOS is its BOS calls it bos."""
    class_V = torch.full((tokenizer.vocab_size,), int(TokenClass.other))
    for index in tokenizer.text_ids:
        text = tokenizer.decode([int(index)])
        if text and "\ufffd" not in text and not any(map(str.isalnum, text)):
            class_V[index] = TokenClass.delimiter
    if tokenizer.eos_id is not None:
        class_V[tokenizer.eos_id] = TokenClass.eos
    if tokenizer.bos_id is not None:
        class_V[tokenizer.bos_id] = TokenClass.bos
    return class_V


def probe_inputs(
    data: TokenDataModule, *, rows: int, device: torch.device | str = "cpu"
) -> ProbeInputs:
    """The probe set of a run's data; fewer prompts of text if the held-out text has fewer.

    rows: prompts of each kind; the rows of the context are the first 16 that validation has.
    Raises ``UserError`` if the run's rows are shorter than a prompt.
    """
    context = data.packing.context
    require(context >= HORIZON, "packing.context", f"must be >= {HORIZON} to be probed", context)
    require(rows >= 1, "rows", "must be >= 1", rows)
    tokenizer = data.tokenizer
    prompts = _text_prompts(data, HORIZON, rows)
    long = {}
    if data.validation.lengths_N.max() >= context:
        long = _text_prompts(data, context, min(rows, LONG_ROWS))
    text = prompts[ProbeKind.text.value]
    draw = np.random.default_rng(SEED)
    ids = np.asarray(tokenizer.text_ids)
    num_prompts = len(text.tokens_BT)
    prompts["random"] = _with_tokens(text, draw.choice(ids, (num_prompts, HORIZON)))
    repeated_B1 = draw.choice(ids, (num_prompts, 1))
    prompts["repeated"] = _with_tokens(text, np.repeat(repeated_B1, HORIZON, axis=1))
    written = data.written(text)
    if written is not None:
        prompts["written"] = written
    return ProbeInputs(
        prompts={name: batch.to(device) for name, batch in prompts.items()},
        context=[data.own_batches()[0].to(device)],
        token_class_V=token_classes(tokenizer).to(device),
        trained_with_bos=data.packing.bos is not BosKind.none,
        rows={f"row_{name}": batch.to(device) for name, batch in long.items()},
    )


def _text_prompts(data: TokenDataModule, num_tokens: int, rows: int) -> dict[str, PackedBatch]:
    """Prompts of text, after a BOS and after an EOS where there are such, with the same labels."""
    tokenizer = data.tokenizer
    kinds = [kind for kind in ProbeKind if kind is ProbeKind.text or tokenizer.bos_id is not None]
    prompts = {kind.value: data.probe_batch(kind, num_tokens, rows) for kind in kinds}
    if ProbeKind.bos_text in kinds and tokenizer.eos_id not in (None, tokenizer.bos_id):
        prompts["eos_text"] = _with_first(prompts[ProbeKind.bos_text.value], tokenizer.eos_id)
    return prompts


def probe_set_sha256(inputs: ProbeInputs) -> str:
    """16 hex digits over the version and every token id: equal ones were probed alike."""
    digest = hashlib.sha256(f"probe set {VERSION}".encode())
    named = [
        *inputs.prompts.items(),
        *inputs.rows.items(),
        *(("context", batch) for batch in inputs.context),
    ]
    for name, batch in named:
        digest.update(f"{name} {tuple(batch.tokens_BT.shape)}".encode())
        digest.update(batch.tokens_BT.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _with_first(batch: PackedBatch, token: int) -> PackedBatch:
    """The batch with another token at position 0 of every row; labels are as they were."""
    tokens_BT = batch.tokens_BT.clone()
    tokens_BT[:, 0] = token
    return dataclasses.replace(batch, tokens_BT=tokens_BT)


def _with_tokens(batch: PackedBatch, tokens_BT: np.ndarray) -> PackedBatch:
    """The batch with other tokens, none of which is a label."""
    return dataclasses.replace(
        batch,
        tokens_BT=torch.from_numpy(tokens_BT).long(),
        labels_BT=torch.full_like(batch.labels_BT, IGNORE_LABEL),
        num_labels=torch.zeros_like(batch.num_labels),
    )
