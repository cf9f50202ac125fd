"""A step that a run kept: its model, its tokenizer, and what one asks of them first."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from data.packing import BosKind
from data.tokenizers import TextTokenizer, read_tokenizer
from kernels.errors import UserError, require
from models.batch import PackedBatch
from models.checkpoints import load_model, read_description
from models.decoder import Decoder
from models.huggingface import export_huggingface
from models.overrides import LayerOverride

if TYPE_CHECKING:
    from train.runs import Run


class Checkpoint:
    """Of ``Run.at``: the kept ``step``, after ``tokens`` tokens. Files are read when asked for."""

    def __init__(self, run: Run, step: int):
        self.run = run
        self.step = step
        self.tokens = step * run.tokens_per_step
        self.path: Path = run.folder.checkpoint(step)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @cached_property
    def model(self) -> Decoder:
        """The decoder in evaluation mode, on the CPU."""
        return load_model(self.path).eval()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the file of the weights, as its description has it."""
        return read_description(self.path)["weights_sha256"]

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The run's tokenizer: of its folder, or of the cache for a folder from before it had one.

        Raises ``UserError`` if it isn't the one that the run was trained with.
        """
        path, run = self.run.folder.tokenizer, self.run
        if not path.exists():
            return run.data().tokenizer
        tokenizer = read_tokenizer(path, run.config.tokenizer)
        expected = run.provenance["data"]["tokenizer_sha256"]
        require(tokenizer.sha256 == expected, str(path), f"must have SHA-256 {expected}", "another")
        return tokenizer

    @torch.no_grad()
    def attention(self, text: str, layer: int, head: int, bos: bool | None = None) -> pd.DataFrame:
        """What each token of ``text`` (rows) pays to each (columns), [T, T], by the tokens' text.

        Computed by the reference attention under a causal mask. A row sums to 1 without what goes
        to a slot; of a kind that is no softmax it has shares of the absolute weights. bos: whether
        the BOS is put in front; None does so if the run was trained with one.
        Raises ``UserError`` for a layer or head that doesn't exist, and without tokens.
        """
        model, tokenizer = self.model, self.tokenizer
        for name, value, count in (
            ("layer", layer, model.config.num_layers),
            ("head", head, model.config.num_heads),
        ):
            require(0 <= value < count, name, f"must be in 0, ..., {count - 1}", value)
        if bos is None:
            bos = self.run.config.packing.bos is not BosKind.none
        ids = tokenizer.encode_batch([text])[0]
        if bos:
            if tokenizer.bos_id is None:
                raise UserError("bos must be false for a tokenizer without BOS, got True")
            ids = [tokenizer.bos_id, *ids]
        require(len(ids) > 0, "text", "must have at least one token", text)
        batch = PackedBatch.of_prompts(torch.tensor([ids]))
        record = model(batch, {layer: LayerOverride()}, statistics="off").layers[layer]
        names = [tokenizer.decode([index]) for index in ids]
        return pd.DataFrame(record.probabilities_BHTS[0, head].numpy(), names, names)

    def to_hf(self, path: Path | str) -> None:
        """Write a new folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

        The tokenizer adds no BOS by itself, as the run's doesn't: put it in front where wanted.
        Raises ``UserError`` for a model that is no LLaMA or a folder that holds anything already.
        """
        tokenizer, names = self.tokenizer, self.run.config.tokenizer
        specials = {"bos_token": names.bos, "eos_token": names.eos, "pad_token": names.pad}
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.run.config.packing.context,
        }
        described |= {name: token for name, token in specials.items() if token is not None}
        export_huggingface(
            self.model,
            path,
            settings={
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
            },
            files={
                "tokenizer.json": tokenizer.to_bytes(),
                "tokenizer_config.json": (json.dumps(described, indent=2) + "\n").encode(),
            },
        )
