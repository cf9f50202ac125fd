"""Which keys each query sees: one interval of keys per query, and at most one pinned key.

    query i sees key j  iff  j < stop[i]  and  (j < pinned  or  j >= start[i])

Every packing mask of the papers has this form (causal, within documents, window, prefix LM, a BOS
that all documents see), so a kernel finds whole tiles to skip from the minimum and maximum of start
and stop, and every count below is exact and takes O(T). A row is empty where start = stop = 0
(padding). Masks are built and checked on the CPU; what is derived from them on a device is
neither checked nor synchronised.

Axes: B rows of the batch, T query positions, S key positions (S = T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.errors import UserError, require


def interval_sees(start: Tensor, stop: Tensor, pinned: int, key: Tensor) -> Tensor:
    """bool: the rule of ``IntervalMask``, for keys >= 0; the shapes broadcast."""
    visible = key >= start
    if pinned:
        visible |= key < pinned
    return visible & (key < stop)


@dataclass(kw_only=True)
class IntervalMask:
    """An interval of visible keys for each query.

    start_BT, stop_BT: int32, 0 <= start <= stop <= T; the visible keys are start, ..., stop - 1.
    document_start_BT: int32; index in the row of the first token of the query's own document, -1 on
        padding, whose rows must be empty. It takes no part in the visibility.
    pinned: 1 if key 0 is seen by every query with stop > 0 whatever its start, else 0. More pinned
        keys would show a document's first tokens to the other documents.
    is_causal: every row is exactly the causal one, start 0 and stop i + 1.
    one_document: document_start is 0 everywhere but on padding, so key 0 begins every document.

    Raises ``UserError`` for other shapes, dtypes or (CPU tensors only) values.
    """

    start_BT: Tensor
    stop_BT: Tensor
    document_start_BT: Tensor
    pinned: int = 0
    is_causal: bool = False
    one_document: bool = False

    def __post_init__(self):
        # On a device the values come from a mask that was checked; reading them would synchronise.
        if not torch.compiler.is_compiling() and self.start_BT.device.type == "cpu":
            self._check()

    @classmethod
    def causal(
        cls, batch_size: int, num_tokens: int, document_start_BT: Tensor | None = None
    ) -> IntervalMask:
        """Every query sees itself and all keys before it.

        document_start_BT: int32; each row is one document if it is left out.
        """
        require(batch_size >= 1, "mask.batch_size", "must be >= 1", batch_size)
        require(num_tokens >= 1, "mask.num_tokens", "must be >= 1", num_tokens)
        start_BT = torch.zeros(batch_size, num_tokens, dtype=torch.int32)
        if document_start_BT is None:
            document_start_BT = torch.zeros_like(start_BT)
        stop_BT = (_positions_T(start_BT) + 1).repeat(batch_size, 1)
        return cls(
            start_BT=start_BT,
            stop_BT=stop_BT,
            document_start_BT=document_start_BT,
            is_causal=True,
            one_document=not bool((document_start_BT > 0).any()),
        )

    @classmethod
    def from_documents(
        cls, document_BT: Tensor, *, pinned: int = 0, causal_across: bool = False
    ) -> IntervalMask:
        """The mask of packed rows.

        document_BT: integers on the CPU; -1 padding (at the end of a row), 0 a pinned BOS (at
            position 0), documents from 1. A run of equal ids is one document.
        pinned: 1 keeps key 0 visible to every document; it must then be the BOS in every row.
        causal_across: queries see all earlier documents too (start 0, stop i + 1).
        """
        require(document_BT.ndim == 2, "mask.document", "must be [B, T]", tuple(document_BT.shape))
        require(not document_BT.is_floating_point(), "mask.document", "must be integers", "floats")
        # NumPy takes half of PyTorch's time for arrays of this size.
        number_BT = document_BT.to(torch.int32).numpy()
        _check_documents(number_BT, pinned)

        begins_BT = np.ones(number_BT.shape, bool)
        np.not_equal(number_BT[:, 1:], number_BT[:, :-1], out=begins_BT[:, 1:])
        # Runs of equal ids lie end to end: what is constant in a run is its value, repeated.
        begin_D = np.flatnonzero(begins_BT)
        length_D = np.diff(begin_D, append=begins_BT.size)
        row_D, first_D = np.divmod(begin_D, number_BT.shape[1])
        is_text_D = number_BT[row_D, first_D] >= 0

        def repeated_BT(value_D: np.ndarray) -> Tensor:
            value_M = np.repeat(value_D.astype(np.int32), length_D)
            return torch.from_numpy(value_M.reshape(number_BT.shape))

        start_D = np.where(is_text_D & (not causal_across), first_D, 0)
        document_start_D = np.where(is_text_D, first_D, -1)
        return cls(
            start_BT=repeated_BT(start_D),
            stop_BT=repeated_BT(is_text_D).mul_(_positions_T(document_BT) + 1),
            document_start_BT=repeated_BT(document_start_D),
            pinned=pinned,
            is_causal=bool(is_text_D.all() and not start_D.any()),
            one_document=not (document_start_D > 0).any(),
        )

    @property
    def num_tokens(self) -> int:
        """T, the number of queries and of keys."""
        return self.start_BT.shape[1]

    def window(self, window: int) -> IntervalMask:
        """The same mask with at most ``window`` keys up to and including the query's own.

        A pinned key stays visible. Raises ``UserError`` if ``window`` < 1.
        """
        require(window >= 1, "attention.window", "must be >= 1", window)
        if window >= self.num_tokens:
            return self
        earliest_T = _positions_T(self.start_BT) + (1 - window)
        start_BT = torch.minimum(torch.maximum(self.start_BT, earliest_T), self.stop_BT)
        return replace(self, start_BT=start_BT, is_causal=False)

    def prefix(self, prefix: int, *, of_row: bool = False) -> IntervalMask:
        """The prefix-LM mask: the first ``prefix`` tokens see each other both ways.

        Of each document, stop = max(stop, min(document start + prefix, document end)); or of each
        row, whatever its documents, where every query's start is 0. Padding stays empty.
        Raises ``UserError`` if ``prefix`` < 0.
        """
        require(prefix >= 0, "packing.prefix", "must be >= 0", prefix)
        first_BT = self.document_start_BT
        is_padding_BT = first_BT < 0
        if of_row:
            # Padding is at a row's end, so a row's tokens are as many as its queries.
            end_B1 = (~is_padding_BT).sum(1, keepdim=True, dtype=torch.int32)
            inside_BT = _positions_T(first_BT) < prefix
            reach_BT = torch.where(inside_BT, end_B1.clamp(max=prefix), 0)
        else:
            # The end of a document is the nearest later position where another one begins.
            next_start_BT = torch.full_like(first_BT, self.num_tokens)
            next_start_BT[:, :-1] = torch.where(
                first_BT[:, 1:] != first_BT[:, :-1], _positions_T(first_BT)[1:], self.num_tokens
            )
            end_BT = next_start_BT.flip(1).cummin(dim=1).values.flip(1)
            reach_BT = torch.minimum(first_BT + prefix, end_BT)
        stop_BT = torch.where(is_padding_BT, self.stop_BT, torch.maximum(self.stop_BT, reach_BT))
        return replace(self, stop_BT=stop_BT, is_causal=self.is_causal and prefix <= 1)

    def queries_per_key_BS(self) -> Tensor:
        """int64: the number of queries that see each key, the denominator of its mean mass."""
        start_BT, stop_BT = self.start_BT.long(), self.stop_BT.long()
        one_BT = torch.ones_like(start_BT)
        change_BS = torch.zeros(
            start_BT.shape[0], self.num_tokens + 1, dtype=torch.long, device=start_BT.device
        )
        change_BS.scatter_add_(1, start_BT, one_BT).scatter_add_(1, stop_BT, -one_BT)
        count_BS = change_BS[:, :-1].cumsum(1)
        if self.pinned:
            count_BS[:, 0] += (start_BT > 0).sum(1)
        return count_BS

    def keys_per_query_BT(self) -> Tensor:
        """int64: the number of keys each query sees, 0 for an empty row."""
        # start <= stop, so a pinned key outside the interval is one before its start.
        return (self.stop_BT - self.start_BT + self.start_BT.clamp(max=self.pinned)).long()

    def sees_BT(self, key_BT: Tensor) -> Tensor:
        """bool: whether query (b, i) sees key ``key_BT[b, i]``; False for a key below 0."""
        visible_BT = interval_sees(self.start_BT, self.stop_BT, self.pinned, key_BT)
        return visible_BT & (key_BT >= 0)

    def sees_leading_BTP(self, keys: int) -> Tensor:
        """bool: which of the first ``keys`` keys each query sees."""
        key_P = _positions_T(self.start_BT)[:keys]
        return interval_sees(self.start_BT[..., None], self.stop_BT[..., None], self.pinned, key_P)

    def dense_BTS(self) -> Tensor:
        """bool: the mask written out."""
        return self.sees_leading_BTP(self.num_tokens)

    def to_dense(self) -> DenseMask:
        """The same mask as a dense one, for interventions."""
        return DenseMask(
            visible_BTS=self.dense_BTS(),
            document_start_BT=self.document_start_BT,
            pinned=self.pinned,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> IntervalMask:
        """The same mask on ``device``."""
        return replace(
            self,
            start_BT=self.start_BT.to(device, non_blocking=non_blocking),
            stop_BT=self.stop_BT.to(device, non_blocking=non_blocking),
            document_start_BT=self.document_start_BT.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> IntervalMask:
        """The same mask in page-locked memory, for asynchronous copies to a GPU."""
        return replace(
            self,
            start_BT=self.start_BT.pin_memory(),
            stop_BT=self.stop_BT.pin_memory(),
            document_start_BT=self.document_start_BT.pin_memory(),
        )

    def _check(self) -> None:
        start_BT, stop_BT, first_BT = self.start_BT, self.stop_BT, self.document_start_BT
        for name, value in (("start", start_BT), ("stop", stop_BT), ("document_start", first_BT)):
            require(value.dtype == torch.int32, f"mask.{name}", "must be int32", value.dtype)
            require(value.ndim == 2, f"mask.{name}", "must be [B, T]", tuple(value.shape))
            require(
                value.shape == start_BT.shape,
                f"mask.{name}",
                f"must have the shape of start, {tuple(start_BT.shape)}",
                tuple(value.shape),
            )
        require(self.pinned in (0, 1), "mask.pinned", "must be 0 or 1", self.pinned)
        start_BT, stop_BT, first_BT = start_BT.numpy(), stop_BT.numpy(), first_BT.numpy()
        position_T = np.arange(self.num_tokens, dtype=np.int32)
        _require_all(start_BT >= 0, "mask.start", "must be >= 0", start_BT)
        _require_all(start_BT <= stop_BT, "mask.start", "must be <= stop", start_BT)
        _require_all(
            stop_BT <= self.num_tokens, "mask.stop", f"must be <= T = {self.num_tokens}", stop_BT
        )
        _require_all(first_BT >= -1, "mask.document_start", "must be >= -1", first_BT)
        _require_all(
            first_BT <= position_T,
            "mask.document_start",
            "must not lie after its query",
            first_BT,
        )
        _require_all(
            (first_BT >= 0) | (stop_BT == 0),
            "mask.stop",
            "must be 0 on padding (document_start -1)",
            stop_BT,
        )
        if self.one_document:
            _require_all(
                first_BT <= 0,
                "mask.document_start",
                "must be 0, or -1 on padding, where one_document is set",
                first_BT,
            )
        if self.is_causal:
            _require_all(
                (start_BT == 0) & (stop_BT == position_T + 1),
                "mask.stop",
                "must be i + 1 and start 0 where is_causal is set",
                stop_BT,
            )


@dataclass(kw_only=True)
class DenseMask:
    """Any visibility, written out; only the reference implementation takes it.

    visible_BTS: bool; query i sees key j. A row may be empty.
    document_start_BT: int32, as in ``IntervalMask``.
    pinned: 1 if ``window`` leaves key 0 visible, else 0.
    """

    visible_BTS: Tensor
    document_start_BT: Tensor
    pinned: int = 0

    def __post_init__(self):
        visible, first = self.visible_BTS, self.document_start_BT
        require(visible.dtype == torch.bool, "mask.visible", "must be bool", visible.dtype)
        require(
            visible.ndim == 3 and visible.shape[1] == visible.shape[2],
            "mask.visible",
            "must be [B, T, T]",
            tuple(visible.shape),
        )
        require(
            first.dtype == torch.int32 and first.shape == visible.shape[:2],
            "mask.document_start",
            f"must be int32 {tuple(visible.shape[:2])}",
            f"{first.dtype} {tuple(first.shape)}",
        )
        require(self.pinned in (0, 1), "mask.pinned", "must be 0 or 1", self.pinned)

    @property
    def num_tokens(self) -> int:
        """T, the number of queries and of keys."""
        return self.visible_BTS.shape[1]

    def window(self, window: int) -> DenseMask:
        """The same mask without the keys ``window`` or more positions before the query."""
        require(window >= 1, "attention.window", "must be >= 1", window)
        key_S = _positions_T(self.document_start_BT)
        near_TS = (key_S > key_S[:, None] - window) | (key_S < self.pinned)
        return replace(self, visible_BTS=self.visible_BTS & near_TS)

    def queries_per_key_BS(self) -> Tensor:
        """int64: the number of queries that see each key."""
        return self.visible_BTS.sum(1)

    def keys_per_query_BT(self) -> Tensor:
        """int64: the number of keys each query sees."""
        return self.visible_BTS.sum(2)

    def sees_BT(self, key_BT: Tensor) -> Tensor:
        """bool: whether query (b, i) sees key ``key_BT[b, i]``; False for a key below 0."""
        index_BT1 = key_BT.clamp(min=0).long()[..., None]
        return (key_BT >= 0) & self.visible_BTS.gather(2, index_BT1).squeeze(2)

    def sees_leading_BTP(self, keys: int) -> Tensor:
        """bool: which of the first ``keys`` keys each query sees."""
        return self.visible_BTS[..., :keys]

    def dense_BTS(self) -> Tensor:
        """bool: the mask itself."""
        return self.visible_BTS

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseMask:
        """The same mask on ``device``."""
        return replace(
            self,
            visible_BTS=self.visible_BTS.to(device, non_blocking=non_blocking),
            document_start_BT=self.document_start_BT.to(device, non_blocking=non_blocking),
        )


def _positions_T(like_BT: Tensor) -> Tensor:
    return torch.arange(like_BT.shape[1], dtype=torch.int32, device=like_BT.device)


def _check_documents(document_BT: np.ndarray, pinned: int) -> None:
    setting = "mask.document"
    _require_all(document_BT >= -1, setting, "must be >= -1", document_BT)
    later_BT, earlier_BT = document_BT[:, 1:], document_BT[:, :-1]
    _require_all(later_BT != 0, setting, "0, the pinned BOS, must be at position 0", document_BT)
    _require_all(
        (later_BT < 0) | (earlier_BT >= 0), setting, "-1, padding, must end its row", document_BT
    )
    if pinned:
        # A row of padding alone has no BOS to pin.
        _require_all(
            document_BT[:, :1] <= 0,
            setting,
            "must be 0 at position 0 of each row if pinned is 1",
            document_BT[:, :1],
        )


def _require_all(holds_BT: np.ndarray, setting: str, rule: str, value_BT: np.ndarray) -> None:
    """Raise for the first row of ``value_BT`` with a False in ``holds_BT``."""
    if not holds_BT.all():
        row = int((~holds_BT).nonzero()[0][0])
        values = value_BT[row].tolist()
        shown = values if len(values) <= 16 else f"{values[:16]}..."
        raise UserError(f"{setting} {rule}, got {shown} in row {row}")
