"""A run's data as a Lightning data module: training rows, held-out rows, and where we are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from data.corpora import CorpusConfig, OpenCorpus, open_corpus
from data.documents import Documents, ranges
from data.evaluation import (
    Pieces,
    ProbeKind,
    canonical_batches,
    canonical_pieces,
    own_batches,
    probe_batch,
)
from data.files import json_sha256
from data.interventions import Interventions
from data.packing import PackingConfig, check_special_tokens
from data.report import PackingReport, packing_report
from data.rows import SpecialIds
from data.stream import Seen, TrainingLoader, TrainingStream
from data.tokenizers import TextTokenizer, TokenizerConfig
from kernels.errors import UserError, require
from models.batch import IGNORE_LABEL, PackedBatch, RowCursor


class TokenDataModule(LightningDataModule):
    """Corpus, tokenizer and packing put together.

    The training loader never ends: train by ``max_steps``, with ``accumulate_grad_batches =
    accumulation(world_size)`` and ``use_distributed_sampler=False``. Its place in the stream is
    saved and restored with the trainer's checkpoints, exactly, whatever the number of workers.

    cache_dir: folder for tokenizers, stores and what ``datasets`` keeps.
    data_seed: order of documents and rows.
    num_workers: processes that make batches; 0 makes them in the training process.
    canonical_rows, own_rows: rows of the held-out batches, at most; evaluation_batch_rows: rows of
        one such batch.
    rank, world_size: null takes them from the trainer, or 0 of 1 without one.

    Raises ``UserError`` for settings that don't go together or data that can't be used.
    """

    def __init__(
        self,
        corpus: CorpusConfig,
        tokenizer: TokenizerConfig,
        packing: PackingConfig,
        *,
        cache_dir: Path | str,
        data_seed: int = 0,
        num_workers: int = 0,
        canonical_rows: int = 64,
        own_rows: int = 64,
        evaluation_batch_rows: int = 16,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__()
        require(data_seed >= 0, "data_seed", "must be >= 0", data_seed)
        require(num_workers >= 0, "num_workers", "must be >= 0", num_workers)
        require(canonical_rows >= 1, "canonical_rows", "must be >= 1", canonical_rows)
        require(own_rows >= 1, "own_rows", "must be >= 1", own_rows)
        require(
            evaluation_batch_rows >= 1,
            "evaluation_batch_rows",
            "must be >= 1",
            evaluation_batch_rows,
        )
        check_special_tokens(packing, tokenizer)
        self.packing = packing
        self.cursor = RowCursor()
        self._corpus_config = corpus
        self._tokenizer_config = tokenizer
        self._cache_dir = Path(cache_dir)
        self._data_seed = data_seed
        self._num_workers = num_workers
        self._canonical_rows = canonical_rows
        self._own_rows = own_rows
        self._evaluation_batch_rows = evaluation_batch_rows
        self._rank = rank
        self._world_size = world_size
        self._corpus: OpenCorpus | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the corpus, building tokenizer and store if the cache has none.

        Needs no trainer; a second call does nothing. Other ranks of the machine wait for the one
        that builds.
        """
        if self._corpus is not None:
            return
        corpus = open_corpus(self._corpus_config, self._tokenizer_config, self._cache_dir)
        self._specials = SpecialIds.of(corpus.tokenizer)
        self._interventions = Interventions.of(self.packing, corpus.tokenizer, self._data_seed)
        self._stream = TrainingStream(
            corpus.train, self.packing, self._specials, self._data_seed, self._interventions
        )
        self._corpus = corpus

    @property
    def corpus(self) -> OpenCorpus:
        """The open corpus; ``setup`` must have run."""
        assert self._corpus is not None, "setup() must run first"
        return self._corpus

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the corpus."""
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids the model must know, special ones included."""
        return self.tokenizer.vocab_size

    @property
    def sha256(self) -> str:
        """SHA-256 that names the data: what a result cites."""
        return self.corpus.sha256

    @property
    def validation(self) -> Documents:
        """The held-out documents, in an order of chance.

        A corpus lies in the order of its sources: its first documents alone, which evaluation
        takes, would be of one of them.
        """
        return self.corpus.validation.epoch(0).in_order_of_chance()

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of a rank in a step; ``UserError`` if the batch can't be shared evenly."""
        return self.packing.micro_batches(world_size)

    def train_dataloader(self) -> TrainingLoader:
        """Micro-batches of this rank from the cursor on, without end."""
        self.setup()
        trainer = self.trainer
        rank = self._rank if self._rank is not None else (trainer.global_rank if trainer else 0)
        world_size = self._world_size or (trainer.world_size if trainer else 1)
        return TrainingLoader(
            self._stream,
            self.cursor,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
        )

    def transfer_batch_to_device(
        self, batch: PackedBatch, device: torch.device, dataloader_idx: int
    ) -> PackedBatch:
        """Copy without waiting: batches are in pinned memory if there is a GPU."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Remember how far training has come: prefetched batches don't count."""
        if self.trainer is not None and self.trainer.training:
            self.cursor = batch.cursor
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is a cursor of."""
        return {**self.cursor._asdict(), "stream": self._stream_sha256}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved cursor.

        Raises ``UserError`` if it was saved over other data, packing or order.
        """
        if state_dict["stream"] != self._stream_sha256:
            raise UserError(
                "resume must use the corpus, tokenizer, packing and data_seed of the checkpoint, "
                "got others: the place in the data would mean other rows"
            )
        self.cursor = RowCursor(*(state_dict[field] for field in RowCursor._fields))

    @cached_property
    def _stream_sha256(self) -> str:
        self.setup()
        order = asdict(self.packing)
        # How a step is cut into batches changes no row.
        del order["batch_tokens"], order["micro_batch_rows"]
        return json_sha256({"data": self.sha256, "packing": order, "data_seed": self._data_seed})

    def seen(self, cursor: RowCursor) -> Seen:
        """What lies before a cursor: rows, passes, unique tokens."""
        self.setup()
        return self._stream.seen(cursor)

    def own_batches(self) -> list[PackedBatch]:
        """The first held-out rows, packed as in training."""
        return self._own_batches

    @cached_property
    def _own_batches(self) -> list[PackedBatch]:
        return own_batches(
            self.validation,
            self.packing,
            self._specials,
            interventions=self._interventions,
            num_rows=self._own_rows,
            batch_rows=self._evaluation_batch_rows,
        )

    def canonical_batches(self) -> list[PackedBatch]:
        """Held-out text with the same labels in every arm of this context."""
        return canonical_batches(
            self.validation,
            self._canonical_pieces,
            self.packing,
            self._specials,
            batch_rows=self._evaluation_batch_rows,
        )

    def probe_batch(
        self, kind: ProbeKind | str, num_tokens: int = 64, num_rows: int = 100
    ) -> PackedBatch:
        """Prompts of ``num_tokens`` from held-out text, with the same labels for both kinds."""
        return probe_batch(
            self.validation,
            ProbeKind(kind),
            self.packing,
            self._specials,
            num_tokens=num_tokens,
            num_rows=num_rows,
        )

    def written(self, batch: PackedBatch) -> PackedBatch | None:
        """Prompts with what packing writes into every row written into them too, without labels;
        None where it writes nothing, or beyond their end."""
        tokens_BT = self._interventions.written(batch.tokens_BT.numpy(), batch.document_BT.numpy())
        if tokens_BT is None:
            return None
        return replace(
            batch,
            tokens_BT=torch.from_numpy(tokens_BT),
            labels_BT=torch.full_like(batch.labels_BT, IGNORE_LABEL),
            num_labels=torch.zeros_like(batch.num_labels),
        )

    @cached_property
    def _canonical_pieces(self) -> Pieces:
        return canonical_pieces(self.validation, self.packing.context, self._canonical_rows)

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy in nats of the held-out tokens' distribution: a model without context."""
        count_V = np.bincount(self.validation.tokens)
        share_V = count_V[count_V > 0] / count_V.sum()
        return float(-(share_V * np.log(share_V)).sum())

    @cached_property
    def optimal_loss(self) -> float | None:
        """Mean loss in nats of the best predictor on the canonical labels; None if unknown.

        It sees the whole document, so where documents don't fit in a row it is a lower bound.
        """
        process = self.corpus.process
        if process is None:
            return None
        documents, pieces = self.validation, self._canonical_pieces
        tokens_NT = documents.tokens.reshape(len(documents), -1)
        log_probability = process.log_probabilities(tokens_NT).ravel()
        first_label_P = documents.starts_N[pieces.document_P] + pieces.offset_P + 1
        return float(-log_probability[ranges(first_label_P, pieces.length_P - 1)].mean())

    @property
    def trigger_ids(self) -> np.ndarray | None:
        """Ids of the tokens after which the one before is copied; None for text."""
        process = self.corpus.process
        return None if process is None else process.trigger_ids

    def label_bytes(self, labels_BT: Tensor) -> Tensor:
        """int64 scalar on the CPU: UTF-8 bytes of text that the labelled tokens stand for."""
        labels = labels_BT[labels_BT != IGNORE_LABEL].cpu()
        return torch.from_numpy(self.tokenizer.bytes_per_token_V)[labels].sum()

    @cached_property
    def report(self) -> PackingReport:
        """What packing does to the first epoch's documents."""
        rows = self._stream.epoch(0)
        return packing_report(rows.plan, rows.documents.lengths_N, self.packing)

    def describe(self) -> list[str]:
        """Lines of text about the data and its packing."""
        lines = [
            *self.corpus.describe(),
            f"vocabulary {self.vocab_size:,}; unigram entropy {self.unigram_entropy:.3f} nats",
        ]
        if self.trigger_ids is not None:
            triggers = ", ".join(repr(self.tokenizer.decode([i])) for i in self.trigger_ids)
            lines.append(
                f"documents are generated from this text's bigrams; triggers {triggers}; optimal "
                f"canonical loss {self.optimal_loss:.3f} nats"
            )
        return [*lines, *self.report.describe()]
