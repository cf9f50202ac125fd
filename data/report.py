"""What a packing does to documents, from its plan alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.packing import MaskKind, PackingConfig
from data.plan import Plan


@dataclass(frozen=True)
class PackingReport:
    """Figures of one epoch.

    ``tokens`` are those of all documents, BOS and EOS included; ``tokens_cropped`` of them are in
    no row, ``tokens_padded`` positions of rows hold none. A document is cut if its tokens aren't
    all in one row. ``mean_keys`` is the mean number of keys a query sees, padding left out.
    """

    rows: int
    documents: int
    documents_cut: int
    tokens: int
    tokens_cropped: int
    tokens_padded: int
    positions: int
    mean_keys: float

    @property
    def share_cut(self) -> float:
        """Share of the documents that are cut."""
        return self.documents_cut / self.documents

    @property
    def share_cropped(self) -> float:
        """Share of the documents' tokens that are dropped."""
        return self.tokens_cropped / self.tokens

    @property
    def share_padded(self) -> float:
        """Share of the rows' positions that are padding."""
        return self.tokens_padded / self.positions

    @property
    def shares(self) -> str:
        """The three shares as text."""
        return (
            f"documents cut {self.share_cut:.2%}, text cropped {self.share_cropped:.2%}, "
            f"padding {self.share_padded:.2%}"
        )

    def describe(self) -> list[str]:
        """The figures as lines of text."""
        return [
            f"packing: {self.documents:,} documents in {self.rows:,} rows; a query sees "
            f"{self.mean_keys:.1f} keys on average",
            f"  {self.shares}",
        ]


def packing_report(plan: Plan, text_lengths_N: np.ndarray, config: PackingConfig) -> PackingReport:
    """The report of a plan over all documents of these text lengths."""
    tokens_N = text_lengths_N + config.specials_per_document
    length_S = plan.length_S.astype(np.int64)
    is_cut_N = np.zeros(len(tokens_N), bool)
    is_cut_N[plan.document_S[length_S != tokens_N[plan.document_S]]] = True
    used_R = plan.tokens_R + config.pinned
    positions = plan.num_rows * config.context
    return PackingReport(
        rows=plan.num_rows,
        documents=len(tokens_N),
        documents_cut=int(is_cut_N.sum()),
        tokens=int(tokens_N.sum()),
        tokens_cropped=int(tokens_N.sum() - length_S.sum()),
        tokens_padded=int(positions - used_R.sum()),
        positions=positions,
        mean_keys=_keys(length_S, used_R, config) / int(used_R.sum()),
    )


def _keys(length_S: np.ndarray, used_R: np.ndarray, config: PackingConfig) -> int:
    causal = config.mask is MaskKind.causal
    extent = used_R if causal else length_S
    # Those of a prefix see the later ones of it too.
    prefix = np.minimum(extent, config.prefix)
    keys = (extent * (extent + 1) // 2 + prefix * (prefix - 1) // 2).sum()
    if not causal:
        # A pinned BOS is one more key for every token, and sees itself.
        keys += config.pinned * (length_S.sum() + len(used_R))
    return int(keys)
