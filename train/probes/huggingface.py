"""Any Hugging Face causal LM, measured by our definitions: the table over open models.

The model runs through our attention (``train.probes.huggingface_attention``), so its statistics are
those of our own models, and ``huggingface_sinks`` makes of them the figures of arXiv 2410.10781,
table 1, on the prompts of ``train.probes.huggingface_prompts``.

A model runs in the precision of its weights. Where those are bf16, the released code of 2410.10781
rounds the attention to bf16 as well; ours is summed in fp32.

A layer that our attention can't compute exactly (a soft cap, dropout, a bias, an argument we don't
know) is refused by its name, as are models that attend outside the interface.

Axes: L layers, B rows, T queries, H query heads, G key/value heads, V vocabulary, X samples.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from kernels.attention import Statistics
from kernels.errors import UserError, require
from kernels.masks import DenseMask, IntervalMask
from train.metrics import HORIZON, SinkTotals
from train.probes.base import Finding
from train.probes.best_keys import best_keys
from train.probes.huggingface_attention import (
    ATTENTION_NAME,
    recording,
    transformers_with_our_attention,
)
from train.probes.huggingface_prompts import (
    huggingface_prompts,
    huggingface_texts,
    huggingface_token_classes,
    prompts_sha256,
)
from train.sink_table import sink_values

log = logging.getLogger(__name__)

LEADING_KEYS = 8
"""Keys whose alpha the table has by head."""

MIN_QUERIES = 32
"""How many queries must see a key after the first for it to count: half of a prompt."""

HUGGINGFACE_COLUMNS = (
    *("model", "probe", "name", "input", "layer", "head", "position", "value"),
    *("probe_set", "num_prompts"),
)
"""Columns of ``huggingface_sinks``."""

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
    """Sinks and norms of a Hugging Face causal LM on every input of ``huggingface_prompts``.

    Returns ``HUGGINGFACE_COLUMNS``: model is the folder's name, probe_set ``prompts_sha256`` of all
    inputs, num_prompts how many this input has; layer, head and position are -1 where a value is
    not of one. By probe, the names are

        sinks   those of ``sink_values``, keys 1 to 7 where at least 32 of the 64 queries see them,
                and of ``best_keys`` (means over prompts), without classes if there is no tokenizer
        norms   hidden_ratio, ||h_0|| / mean_{t > 0} ||h_t|| of the residual stream after each
                block, where blocks can be told; value_ratio, the same of each key head's values
                (arXiv 2410.10781); means over prompts

    texts: see ``huggingface_texts``. batch_rows: prompts in a forward pass.

    Raises ``UserError`` for a folder, texts or layers that can't be used.
    """
    require(batch_rows >= 1, "batch_rows", "must be >= 1", batch_rows)
    model, tokenizer = load_causal_lm(folder, device)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or HORIZON
    require(limit >= HORIZON, "hf", f"must be a model of at least {HORIZON} positions", limit)
    prompts = huggingface_prompts(
        tokenizer, config.vocab_size, huggingface_texts(texts, Path(cache_dir)), rows, seed
    )
    class_V = None
    if tokenizer is None:
        log.warning("%s has no tokenizer: only random and repeated tokens are measured", folder)
    else:
        class_V = huggingface_token_classes(tokenizer, config.vocab_size).to(device)
    tables = []
    for name, tokens_BT in prompts.items():
        batches = tokens_BT.to(device).split(batch_rows)
        table = _of_input(model, batches, class_V, name)
        tables.append(table.assign(num_prompts=len(tokens_BT)))
    # By the path as it was given: a link's name says more than that of what it points to.
    told = {"model": Path(os.path.abspath(Path(folder).expanduser())).name}
    whole = pd.concat(tables, ignore_index=True).assign(**told, probe_set=prompts_sha256(prompts))
    return whole[list(HUGGINGFACE_COLUMNS)]


def _of_input(
    model: Any, batches: Iterable[Tensor], class_V: Tensor | None, name: str
) -> pd.DataFrame:
    """Figures of one input: probe and the fields of ``Finding``."""
    totals = SinkTotals(model.config.get_text_config(decoder=True).num_hidden_layers)
    # By probe, name and layer, a value a sample and head.
    samples: dict[tuple[str, str, int], list[Tensor]] = {}
    for tokens_BT in batches:
        record = statistics_of(model, tokens_BT)
        begins_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        begins_BT[:, 0] = True
        totals.add(
            record.statistics, record.masks, begins_BT, LEADING_KEYS, min_queries=MIN_QUERIES
        )
        for layer, what, value_XH in best_keys(record.statistics, record.masks, class_V, tokens_BT):
            samples.setdefault(("sinks", what, layer), []).append(value_XH)
        for layer, what, value_BX in _norm_ratios(record):
            samples.setdefault(("norms", what, layer), []).append(value_BX)
    sinks = sink_values(totals.reduce(lambda sums: sums)).assign(probe="sinks", input=name)
    rows = []
    for (probe, what, layer), parts in samples.items():
        means = torch.cat(parts).double().mean(0)
        # A number for each head, or one of the layer.
        heads = enumerate(means.tolist()) if means.ndim else [(-1, means.item())]
        rows += [(probe, *Finding(what, name, value, layer, head)) for head, value in heads]
    return pd.concat([sinks, pd.DataFrame(rows, columns=["probe", *Finding._fields])])


def _norm_ratios(record: CausalLMRecord) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, name, ratio_B or ratio_BG)."""
    hidden = record.hidden_norm_LBT
    for what, norms in (("hidden_ratio", hidden), ("value_ratio", record.value_norms)):
        for layer, norm_BTX in enumerate(() if norms is None else norms):
            yield layer, what, norm_BTX[:, 0] / norm_BTX[:, 1:].mean(1)
