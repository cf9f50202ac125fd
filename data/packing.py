"""How documents become rows: independent choices, planned before any token is touched.

A document is [BOS if bos=document] + its text + [EOS if eos]. A packer lays documents into rows of
``context`` input tokens (one less for stream tokens if a pinned BOS begins every row):

    chunk      concatenate and cut: no padding but in the last row, most rows cut a document
    best_fit   whole documents by best fit; where none fits, one is cropped to fill the row
    single     one document a row, cropped at the row's end, padded

Its result is a ``Plan``: flat arrays of segments, made without reading tokens (``data.plan``);
``data.rows`` turns any of its rows into tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from data.best_fit import pack_best_fit
from data.plan import LabelRule, Plan, pack_chunk, pack_single
from data.tokenizers import TokenizerConfig
from kernels.errors import UserError, require


class Packer(StrEnum):
    """How documents are laid into rows."""

    chunk = "chunk"
    best_fit = "best_fit"
    single = "single"


class MaskKind(StrEnum):
    """Which earlier tokens of a row a token sees."""

    causal = "causal"
    document = "document"


class BosKind(StrEnum):
    """Where BOS tokens are put."""

    none = "none"
    document = "document"
    pinned = "pinned"


class PositionKind(StrEnum):
    """What positions count from."""

    row = "row"
    document = "document"


PACKERS: dict[Packer, Callable[[np.ndarray, int], Plan]] = {
    Packer.chunk: pack_chunk,
    Packer.best_fit: pack_best_fit,
    Packer.single: pack_single,
}
"""Each takes the documents' lengths (specials included) and the stream tokens of a row."""


@dataclass(kw_only=True)
class PackingConfig:
    """Settings of packing and of the batch."""

    packer: Packer = Packer.chunk
    """How documents are laid into rows: chunk, best_fit or single."""

    mask: MaskKind = MaskKind.causal
    """causal: a token sees all earlier tokens of its row; document: those of its document."""

    bos: BosKind = BosKind.none
    """document: one before each document; pinned: one at position 0 of each row, seen by all."""

    eos: bool = True
    """Whether each document ends in EOS."""

    positions: PositionKind = PositionKind.row
    """row: 0 to context - 1; document: from 0 in each document's piece (after a pinned BOS, 1)."""

    context: int = 256
    """Input tokens of a row, BOS and EOS included."""

    batch_tokens: int = 4096
    """Input tokens of a training step, over all ranks and micro-batches: rows x context."""

    micro_batch_rows: int | None = None
    """Rows of one forward pass on one rank; null = the rank's whole share of the batch."""

    fixed_position: int | None = None
    """Position of every row, from 0, where ``fixed_token`` is written over what is there."""

    fixed_token: str | None = None
    """The token written there, given as text or as the token itself."""

    random_positions: list[int] = field(default_factory=list)
    """Positions whose tokens are drawn at random from the vocabulary, anew for each row."""

    prefix: int = 0
    """Tokens at the start of each row (mask causal) or document's piece (mask document) that see
    each other both ways, a prefix language model (arXiv 2410.10781); they aren't predicted, but
    for the first by a pinned BOS that isn't of the prefix (mask document)."""

    loss_from: int = 0
    """Position of the row from which on losses are taken; the targets before it only are read."""

    loss_at_bos: bool = True
    """Whether a BOS has a loss, that of the token after it (arXiv 2603.06591 trains without)."""

    def __post_init__(self):
        require(self.context >= 2, "packing.context", "must be >= 2", self.context)
        require(
            self.batch_tokens >= self.context and self.batch_tokens % self.context == 0,
            "packing.batch_tokens",
            f"must be a multiple of packing.context = {self.context}",
            self.batch_tokens,
        )
        require(
            self.micro_batch_rows is None or self.micro_batch_rows >= 1,
            "packing.micro_batch_rows",
            "must be >= 1 or null",
            self.micro_batch_rows,
        )
        require(
            (self.fixed_position is None) == (self.fixed_token is None),
            "packing.fixed_token",
            "must be set together with packing.fixed_position",
            self.fixed_token,
        )
        require(
            len(set(self.random_positions)) == len(self.random_positions),
            "packing.random_positions",
            "must be distinct",
            self.random_positions,
        )
        for name in ("prefix", "loss_from"):
            require(
                0 <= getattr(self, name) < self.context,
                f"packing.{name}",
                f"must be in 0, ..., {self.context - 1}",
                getattr(self, name),
            )
        require(
            self.loss_at_bos or self.bos is not BosKind.none,
            "packing.loss_at_bos",
            "must be true without a BOS (packing.bos=none)",
            self.loss_at_bos,
        )
        if self.fixed_position is not None:
            self._check_position("fixed_position", self.fixed_position)
        for position in self.random_positions:
            self._check_position("random_positions", position)
            require(
                position != self.fixed_position,
                "packing.random_positions",
                "must leave packing.fixed_position out",
                self.random_positions,
            )

    def _check_position(self, name: str, position: int) -> None:
        after = " and after the pinned BOS" if self.pinned else ""
        require(
            self.pinned <= position < self.context,
            f"packing.{name}",
            f"must be in the row of {self.context}{after}",
            position,
        )

    def plain(self) -> PackingConfig:
        """The same packing with nothing written into its rows, no prefix, and all losses."""
        return replace(
            self,
            fixed_position=None,
            fixed_token=None,
            random_positions=[],
            prefix=0,
            loss_from=0,
            loss_at_bos=True,
        )

    @property
    def labels(self) -> LabelRule:
        """Which positions of a row are labelled."""
        causal = self.mask is MaskKind.causal
        # The last token of a prefix predicts the first one after it.
        unpredicted = max(0, self.prefix - 1)
        return LabelRule(
            causal=causal,
            pinned=self.pinned,
            first=max(self.loss_from, unpredicted if causal else 0),
            first_of_piece=0 if causal else unpredicted,
            at_pinned=self.loss_at_bos,
            at_begin=self.loss_at_bos or self.bos is not BosKind.document,
        )

    @property
    def batch_rows(self) -> int:
        """Rows of a training step, over all ranks and micro-batches."""
        return self.batch_tokens // self.context

    @property
    def pinned(self) -> int:
        """1 if a BOS is pinned at position 0 of each row, else 0."""
        return int(self.bos is BosKind.pinned)

    @property
    def capacity(self) -> int:
        """Stream tokens of a row: what documents are laid into."""
        return self.context - self.pinned

    @property
    def specials_per_document(self) -> int:
        """BOS and EOS tokens added to each document."""
        return int(self.bos is BosKind.document) + int(self.eos)

    def micro_batches(self, world_size: int) -> int:
        """Forward passes of one rank in a training step.

        Raises ``UserError`` unless every rank and micro-batch gets the same number of rows.
        """
        micro = self.micro_batch_rows or max(1, self.batch_rows // world_size)
        require(
            self.batch_rows % (micro * world_size) == 0,
            "packing.batch_tokens",
            f"must be a multiple of context {self.context} x micro-batch rows {micro} x "
            f"{world_size} ranks = {self.context * micro * world_size}",
            self.batch_tokens,
        )
        return self.batch_rows // (micro * world_size)


def check_special_tokens(packing: PackingConfig, tokenizer: TokenizerConfig) -> None:
    """Raise ``UserError`` if the packing needs a token that the tokenizer is to do without."""
    if packing.bos is not BosKind.none and tokenizer.bos is None:
        raise UserError(
            "packing.bos must be none for a tokenizer without BOS (tokenizer.bos is null), "
            f"got {packing.bos.value!r}"
        )
    if packing.eos and tokenizer.eos is None:
        raise UserError(
            "packing.eos must be false for a tokenizer without EOS (tokenizer.eos is null), "
            "got True"
        )
    # At a document's end an EOS that is the BOS would be the pinned token once more.
    if packing.pinned and tokenizer.bos == tokenizer.eos:
        raise UserError(
            "packing.bos must not be pinned if tokenizer.bos and tokenizer.eos are one token, "
            f"got {packing.bos.value!r}"
        )


def plan_in_order(text_lengths_N: np.ndarray, config: PackingConfig) -> Plan:
    """Pack documents of these text lengths in their order; rows stay in the order of packing."""
    return PACKERS[config.packer](text_lengths_N + config.specials_per_document, config.capacity)


def plan_epoch(
    text_lengths_N: np.ndarray, config: PackingConfig, data_seed: int, epoch: int
) -> Plan:
    """The rows of an epoch: documents permuted, packed, rows permuted.

    A function of its arguments alone; the order of documents doesn't depend on the packing.
    """
    rng = np.random.default_rng([data_seed, epoch])
    order_N = rng.permutation(len(text_lengths_N))
    plan = plan_in_order(text_lengths_N[order_N], config).with_documents(order_N)
    return plan.take(rng.permutation(plan.num_rows))
