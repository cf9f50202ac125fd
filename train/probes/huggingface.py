"""Any Hugging Face causal LM, measured by our definitions: the table over open models.

The model runs through our attention (``train.probes.huggingface_attention``), so its statistics are
those of our own models, and ``huggingface_sinks`` makes of them the figures of arXiv 2410.10781,
table 1: 64-token prompts of text, of random tokens and of one token over and over.

A model runs in the precision of its weights. Where those are bf16, the released code of 2410.10781
rounds the attention to bf16 as well; ours is summed in fp32.

A layer that our attention can't compute exactly (a soft cap, dropout, a bias, an argument we don't
know) is refused by its name, as are models that attend outside the interface.

Axes: L layers, B rows, T queries, G key/value heads, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data.corpora.austen import AustenConfig, AustenCorpus, AustenUnit
from data.corpora.reading import read_file
from data.documents import Split
from kernels.attention import Statistics
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask
from train.metrics import HORIZON, SinkTotals
from train.probes.huggingface_attention import (
    ATTENTION_NAME,
    recording,
    transformers_with_our_attention,
)
from train.sink_table import sink_values

log = logging.getLogger(__name__)

LEADING_KEYS = 8
"""Keys whose alpha the table has by head."""

MIN_QUERIES = 32
"""How many queries must see a key after the first for it to count: half of a prompt."""

_BY_INTERFACE = "must be a model that attends through transformers' attention interface"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class CausalLMRecord(NamedTuple):
    """What a model measured on one batch; the lists have one entry a layer.

    statistics: as of ``sink_attention`` at level ``full``, key mass included.
    masks: which keys each query saw; dense where that is no interval.
    value_norms: l2 norm of each value vector, fp32 [B, T, G].
    hidden_norm_LBT: l2 norm of the residual stream after each block, fp32; None where the blocks
        can't be told from the modules.
    logits_BTV: in the model's dtype.
    """

    statistics: list[Statistics]
    masks: list[IntervalMask | DenseMask]
    value_norms: list[Tensor]
    hidden_norm_LBT: Tensor | None
    logits_BTV: Tensor


def load_causal_lm(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The model of a Hugging Face folder on ``device``, with our attention, and its tokenizer.

    The tokenizer is None if the folder has none (an export of ours). Nothing is downloaded, no code
    of the folder is run and no pickle is opened.

    Raises ``UserError`` if transformers is missing, or for a folder that is no causal LM, needs
    code of its own, lacks safetensors or some of its weights, or attends outside the interface.
    """
    transformers = transformers_with_our_attention()
    path = Path(folder).expanduser()
    require(
        (path / "config.json").is_file(), "hf", "must be a folder with config.json", str(folder)
    )
    require(
        any(path.glob("*.safetensors")),
        "hf",
        "must be a folder with *.safetensors (pickled weights are not opened)",
        str(folder),
    )
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            **local,
            use_safetensors=True,
            dtype="auto",
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
        tokenizer = None
        if any((path / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (ATTENTION_NAME,):
            # Falcon looks its attention up among its own.
            raise UserError(f"hf {_BY_INTERFACE}, got {folder}") from error
        # Damaged files, unknown model types, code that would have to be run, missing packages for a
        # quantisation: the library raises many kinds, and the user's answer is the same.
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            "hf must be a causal LM that transformers can load by itself, got "
            f"{folder}: {type(error).__name__}: {reason[:300]}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would leave them at random.
        shown = ", ".join(missing[:3])
        raise UserError(f"hf must hold every weight of its model, got {folder} without {shown}")
    require(model._supports_attention_backend, "hf", _BY_INTERFACE, type(model).__name__)
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def statistics_of(model: Any, tokens_BT: Tensor) -> CausalLMRecord:
    """Run a model of ``load_causal_lm`` on whole prompts, int64 on its device, without padding.

    Raises ``UserError`` for a layer that our attention can't compute exactly, and for models with
    layers that don't attend through the interface (linear attention, their own attention).
    """
    config = model.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    norms: dict[nn.Module, Tensor] = {}

    def keep_norm(block: nn.Module, _, output: Tensor | tuple) -> None:
        # `hidden_states` of transformers ends with what the last norm makes of the last block's.
        hidden_BTC = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden_BTC, Tensor):
            norms[block] = hidden_BTC.float().norm(dim=-1)

    handles = [block.register_forward_hook(keep_norm) for blocks in lists for block in blocks]
    try:
        with recording() as recorder:
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(recorder.modules) != num_layers:
        types = sorted(set(getattr(config, "layer_types", None) or ["of unnamed types"]))
        raise UserError(
            f"hf must be a model loaded with attention {ATTENTION_NAME!r} whose layers all attend "
            f"through it once, got {type(model).__name__} with {len(recorder.modules)} calls in "
            f"{num_layers} layers ({', '.join(types)})"
        )
    hidden_norm_LBT = None
    for blocks in lists:
        pairs = zip(blocks, recorder.modules, strict=True)
        if all(block in norms and module in block.modules() for block, module in pairs):
            hidden_norm_LBT = torch.stack([norms[block] for block in blocks])
            break
    return CausalLMRecord(
        recorder.statistics, recorder.masks, recorder.value_norms, hidden_norm_LBT, logits_BTV
    )


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
    """The inputs of arXiv 2410.10781's table over open models, int64 [B, 64] on the CPU.

    text: the first 64 tokens of each text, special ones left out; the first ``rows`` texts that
        have so many.
    bos_text: the BOS and the first 63 of the same texts; only for a tokenizer with a BOS.
    random: tokens drawn alike from the vocabulary without special tokens, ``rows`` prompts.
    repeated: one such token 64 times, another one in each prompt.

    tokenizer: None leaves out the inputs of text. vocab_size: of the model, whose embedding may
    have rows that no token of the tokenizer uses.

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
    return torch.tensor(found)


def huggingface_sinks(
    folder: Path | str,
    texts: Path | str | None = None,
    device: torch.device | str = "cpu",
    rows: int = 100,
    *,
    batch_rows: int = 8,
    seed: int = 0,
    cache_dir: Path | str = ".cache",
) -> pd.DataFrame:
    """Sinks of a Hugging Face causal LM on every input of ``huggingface_prompts``.

    Returns columns probe ("sinks"), name, input, layer, head, position, value; the names are those
    of ``sink_values``. Keys 1 to 7 count where at least 32 of the 64 queries see them.

    texts: see ``huggingface_texts``. batch_rows: prompts in a forward pass.

    Raises ``UserError`` for a folder, texts or layers that can't be used.
    """
    require(batch_rows >= 1, "batch_rows", "must be >= 1", batch_rows)
    model, tokenizer = load_causal_lm(folder, device)
    if tokenizer is None:
        log.warning("%s has no tokenizer: only random and repeated tokens are measured", folder)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or HORIZON
    require(limit >= HORIZON, "hf", f"must be a model of at least {HORIZON} positions", limit)
    prompts = huggingface_prompts(
        tokenizer, config.vocab_size, huggingface_texts(texts, Path(cache_dir)), rows, seed
    )
    tables = []
    for name, tokens_BT in prompts.items():
        totals = SinkTotals(config.num_hidden_layers)
        for part_BT in tokens_BT.to(device).split(batch_rows):
            record = statistics_of(model, part_BT)
            begins_BT = torch.zeros_like(part_BT, dtype=torch.bool)
            begins_BT[:, 0] = True
            totals.add(
                record.statistics, record.masks, begins_BT, LEADING_KEYS, min_queries=MIN_QUERIES
            )
        table = sink_values(totals.reduce(lambda sums: sums))
        table.insert(0, "probe", "sinks")
        table.insert(2, "input", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
