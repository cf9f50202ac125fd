"""Held-out rows: an arm's own packing, the canonical rows, and the probes' prompts.

Documents are taken in the order in which they are given: one of chance, from ``TokenDataModule``.

Canonical rows and prompts are pieces of held-out documents, one a row: the same text tokens are
predicted in every arm, whatever its packing, and only those (no BOS, EOS or PAD is a label).
Pieces don't overlap; all first pieces of the documents come first, then all second ones, and so on.

Axes: B rows, T positions, N documents, P pieces.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from data.documents import Documents
from data.interventions import HELD_OUT, Interventions
from data.packing import BosKind, MaskKind, Packer, PackingConfig, PositionKind, plan_in_order
from data.plan import Plan
from data.rows import SpecialIds, finish_rows, gather_rows
from kernels.errors import UserError, require
from models.batch import IGNORE_LABEL, PackedBatch

MIN_PIECE_TOKENS = 16
"""Shorter pieces are skipped: their losses say little."""


class ProbeKind(StrEnum):
    """Whether a prompt begins with BOS or with the text."""

    text = "text"
    bos_text = "bos_text"


class Pieces(NamedTuple):
    """Pieces of documents, in text tokens; int64 each."""

    document_P: np.ndarray
    offset_P: np.ndarray
    length_P: np.ndarray


def pieces_in_turn(
    lengths_N: np.ndarray, *, max_tokens: int, min_tokens: int, limit: int
) -> Pieces:
    """The first ``limit`` pieces of at most ``max_tokens`` and at least ``min_tokens``.

    Raises ``UserError`` if there is none.
    """
    # More turns than this can't be needed: a document that is left has a piece in each.
    longest = min(int(lengths_N.max()), max_tokens * limit)
    found: list[Pieces] = []
    count = 0
    for offset in range(0, longest, max_tokens):
        length_N = np.minimum(lengths_N - offset, max_tokens)
        document_P = np.flatnonzero(length_N >= min_tokens)[: limit - count]
        found.append(Pieces(document_P, np.full_like(document_P, offset), length_N[document_P]))
        count += len(document_P)
        if count == limit:
            break
    require(
        count > 0,
        "corpus",
        f"must hold out a document of at least {min_tokens} tokens",
        f"at most {longest}",
    )
    return Pieces(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def canonical_pieces(documents: Documents, context: int, limit: int) -> Pieces:
    """Pieces that leave room for a BOS in rows of ``context`` tokens."""
    return pieces_in_turn(
        documents.lengths_N,
        max_tokens=context - 1,
        min_tokens=max(2, min(MIN_PIECE_TOKENS, context - 1)),
        limit=limit,
    )


def own_batches(
    documents: Documents,
    config: PackingConfig,
    specials: SpecialIds,
    *,
    interventions: Interventions,
    num_rows: int,
    batch_rows: int,
) -> list[PackedBatch]:
    """The first rows of the documents in their order, packed and written into as the arm does.

    ``num_labels`` of each batch counts the labels of all of them.
    """
    plan = plan_in_order(documents.lengths_N, config)
    plan = plan.take(np.arange(min(num_rows, plan.num_rows)))
    num_labels = int(plan.labels_R(config.labels).sum())
    batches = []
    num_before = 0
    for part in _batches(plan, batch_rows):
        rows = gather_rows(documents, part, config, specials)
        interventions.write(rows, HELD_OUT, num_before + np.arange(part.num_rows))
        num_before += part.num_rows
        batches.append(finish_rows(rows, config, num_labels=num_labels))
    return batches


def canonical_batches(
    documents: Documents,
    pieces: Pieces,
    config: PackingConfig,
    specials: SpecialIds,
    *,
    batch_rows: int,
) -> list[PackedBatch]:
    """One piece a row, after a BOS if the arm trains with one; labels are its tokens 2 to n.

    ``num_labels`` of each batch counts the labels of all of them.
    """
    num_labels = int((pieces.length_P - 1).sum())
    return [
        _text_rows(documents, part, config, specials, config.bos, num_labels)
        for part in _batches(_plan_of_pieces(pieces), batch_rows)
    ]


def probe_batch(
    documents: Documents,
    kind: ProbeKind,
    config: PackingConfig,
    specials: SpecialIds,
    *,
    num_tokens: int,
    num_rows: int,
) -> PackedBatch:
    """Prompts of exactly ``num_tokens``, plain causal; labels are text tokens 2 to T - 1.

    ``text`` has the first T text tokens of each piece, ``bos_text`` a BOS and the first T - 1.
    There are fewer rows if the held-out text has fewer pieces of T tokens.
    """
    require(num_tokens >= 3, "probe.num_tokens", "must be >= 3", num_tokens)
    pieces = pieces_in_turn(
        documents.lengths_N, max_tokens=num_tokens, min_tokens=num_tokens, limit=num_rows
    )
    if kind is ProbeKind.text:
        bos = BosKind.none
    else:
        bos = BosKind.pinned if config.pinned else BosKind.document
        pieces = pieces._replace(length_P=pieces.length_P - 1)
    if bos is not BosKind.none and specials.bos is None:
        raise UserError("tokenizer.bos must be set for a probe with BOS, got None")
    config = replace(config.plain(), context=num_tokens, batch_tokens=num_tokens)
    num_labels = len(pieces.length_P) * (num_tokens - 2)
    batch = _text_rows(documents, _plan_of_pieces(pieces), config, specials, bos, num_labels)
    # The last text token of ``text`` is not there to be predicted in ``bos_text``.
    batch.labels_BT[:, num_tokens - 2 + (bos is not BosKind.none) :] = IGNORE_LABEL
    return batch


def _text_rows(
    documents: Documents,
    plan: Plan,
    config: PackingConfig,
    specials: SpecialIds,
    bos: BosKind,
    num_labels: int,
) -> PackedBatch:
    """Rows of one piece each, after a BOS unless ``bos`` is none; only text is a label."""
    has_bos = bos is not BosKind.none
    # A document that begins with its BOS and one after a pinned BOS are the same input.
    layout = replace(
        config.plain(),
        packer=Packer.single,
        mask=MaskKind.causal,
        bos=BosKind.pinned if has_bos else BosKind.none,
        eos=False,
        positions=PositionKind.row,
    )
    arrays = gather_rows(documents, plan, layout, specials)
    if bos is BosKind.document:
        arrays.document_BW[:, 0] = 1
        arrays.begins_BT[:, 0] = plan.offset_S == 0
    batch = finish_rows(arrays, layout, num_labels=num_labels)
    if has_bos:
        batch.labels_BT[:, 0] = IGNORE_LABEL
    return batch


def _plan_of_pieces(pieces: Pieces) -> Plan:
    nothing_P = np.full(len(pieces.length_P), -1, np.int32)
    return Plan(
        document_S=pieces.document_P.astype(np.int32),
        offset_S=pieces.offset_P.astype(np.int32),
        length_S=pieces.length_P.astype(np.int32),
        row_offsets_R1=np.arange(len(pieces.length_P) + 1),
        next_document_R=nothing_P,
        next_offset_R=nothing_P,
    )


def _batches(plan: Plan, batch_rows: int) -> list[Plan]:
    return [
        plan.take(np.arange(start, min(start + batch_rows, plan.num_rows)))
        for start in range(0, plan.num_rows, batch_rows)
    ]
