"""Sink metrics: from the attention statistics of a batch to the numbers that are logged.

alpha_k, the attention key k gets, is the mean over the queries that see k, itself included
(arXiv 2410.10781). A head that attends uniformly has alpha = mean of 1 / (keys the query sees, a
slot included), the *baseline*; ``excess`` = alpha - baseline. Since both fall with length, the
headline figures are taken over a horizon of 64 queries, and a key counts only if 64 queries see it.

Sink_k^eps = share of (layer, head) pairs with alpha_k > eps. Each sample is thresholded for itself,
then averaged (the released code of 2410.10781); so what is summed over micro-batches, steps and
ranks is, by layer and head: count, alpha, baseline, and [alpha > eps].

Keys that are measured (the ``kind``):

    first          key 0 over the row's first 64 queries: a 64-token prompt of the papers
    first_row      key 0 over all queries of the row that see it
    document       the first token of each document that begins in the row and has at least 64
                   tokens, over the document's first 64 queries
    null           the null slot over the row's first 64 queries
    first_of_keys  ``first`` with a null slot left out: alpha_first / (1 - alpha_null)
    position       keys 0, 1, ... of the row over all queries that see them

Axes: L layers, H heads, B rows, T queries, K blocks of 64 positions, P leading positions,
E thresholds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import Statistics
from kernels.masks import DenseMask, IntervalMask

HORIZON = 64
"""Queries over which a sink is measured, and how many must see a key for it to count."""

MIN_LEFT = 1e-3
"""What a slot must leave to the keys for their shares of it to be more than rounding."""

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.8)
"""The eps of Sink_k^eps that are counted."""


@dataclass
class SinkSums:
    """Sums over samples (rows or documents): count, alpha, baseline [..., H] or [..., H, P], and
    over [..., E], how many samples have alpha > eps. A leading L axis where layers are stacked."""

    count: Tensor
    alpha: Tensor
    baseline: Tensor
    over: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "SinkSums":
        """The same sums with ``change`` applied to each tensor."""
        return SinkSums(**{name: change(value) for name, value in vars(self).items()})


@dataclass
class SinkTotals:
    """Running sums of a model by kind of key: [L, H] or [L, H, P], on the model's device."""

    num_layers: int
    sums: dict[str, SinkSums] = field(default_factory=dict)

    def add(
        self,
        statistics: list[Statistics],
        masks: list[IntervalMask],
        begins_BT: Tensor,
        positions: int,
        min_queries: int = HORIZON,
        sums_of: "Callable[..., dict[str, SinkSums]] | None" = None,
    ) -> None:
        """Add one batch: statistics and masks by layer; the rest as in ``layer_sums``.

        Layers that share a mask are reduced in one go, as if their heads were one layer's.
        sums_of: what reduces them, ``layer_sums`` compiled; None for ``layer_sums`` as it is.
        """
        sums_of = sums_of or layer_sums
        by_mask: dict[int, list[int]] = {}
        for index, mask in enumerate(masks):
            by_mask.setdefault(id(mask), []).append(index)
        for indices in by_mask.values():
            merged = _merge_heads([statistics[index] for index in indices])
            sums = sums_of(merged, masks[indices[0]], begins_BT, positions, min_queries=min_queries)
            for kind, part in sums.items():
                self._add_layers(kind, indices, part)

    def _add_layers(self, kind: str, indices: list[int], part: SinkSums) -> None:
        # Half precision stops counting at 256.
        assert part.count.dtype in (torch.float32, torch.float64)
        part = part.map(lambda value: value.unflatten(0, (len(indices), -1)))
        if kind not in self.sums:
            self.sums[kind] = part.map(
                lambda value: value.new_zeros(self.num_layers, *value.shape[1:])
            )
        for name, total in vars(self.sums[kind]).items():
            # Not total[indices]: a list goes to the device as a tensor, which waits for it.
            value = getattr(part, name)
            if len(indices) == self.num_layers:
                total += value
            else:
                for index, of_layer in zip(indices, value, strict=True):
                    total[index] += of_layer

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> "SinkTotals":
        """Totals over all ranks, on the CPU; the device is waited for once.

        All ranks have sums of the same kinds, which follow from the rows' length and the settings.
        """
        tensors = [value for sums in self.sums.values() for value in vars(sums).values()]
        if not tensors:
            return SinkTotals(self.num_layers)
        flat = all_reduce(torch.cat([value.flatten() for value in tensors])).cpu()
        parts = iter(flat.split([value.numel() for value in tensors]))
        sums = {
            kind: sums.map(lambda value: next(parts).view(value.shape).to(value.dtype))
            for kind, sums in self.sums.items()
        }
        return SinkTotals(self.num_layers, sums)


def _merge_heads(statistics: list[Statistics]) -> Statistics:
    """Statistics of several layers as those of one layer with all their heads."""
    return Statistics(
        *(
            None if values[0] is None else torch.cat(values, dim=1)
            for values in zip(*statistics, strict=True)
        )
    )


def _sums(alpha_BHX: Tensor, baseline_BX: Tensor, counts_BX: Tensor) -> SinkSums:
    """Sum samples over rows B and, but for positions, over X; ``counts_BX`` or [B, H, X] says which
    count."""
    counts_BHX = (counts_BX if counts_BX.ndim == 3 else counts_BX[:, None]).expand_as(alpha_BHX)
    # Samples that don't count may hold anything (0 / 0 included), so they are cut out, not scaled.
    alpha_BHX = torch.where(counts_BHX, alpha_BHX, 0.0)
    # One by one: a tensor of thresholds made here would wait for the device.
    over_BHXE = torch.stack([alpha_BHX > eps for eps in THRESHOLDS], dim=-1)
    return SinkSums(
        count=counts_BHX.to(alpha_BHX.dtype).sum(0),
        alpha=alpha_BHX.sum(0),
        baseline=torch.where(counts_BHX, baseline_BX[:, None], 0.0).sum(0),
        over=over_BHXE.to(alpha_BHX.dtype).sum(0),
    )


def _over_samples(sums: SinkSums) -> SinkSums:
    return SinkSums(
        sums.count.sum(-1), sums.alpha.sum(-1), sums.baseline.sum(-1), sums.over.sum(-2)
    )


def first_key_sums(
    mass_BHT: Tensor,
    mask: IntervalMask | DenseMask,
    *,
    whole_row: bool = False,
    has_slot: bool = False,
) -> SinkSums | None:
    """[H] sums of the first key's alpha, one sample a row; None for rows under 64 tokens."""
    sees_BT = mask.sees_BT(torch.zeros_like(mask.document_start_BT))
    share_BT = _uniform_share(mask, has_slot)
    if sees_BT.shape[1] < HORIZON:
        return None
    if whole_row:
        queries_B = sees_BT.sum(-1)
        counts_B = queries_B >= HORIZON
    else:
        sees_BT = sees_BT[:, :HORIZON]
        mass_BHT, share_BT = mass_BHT[..., :HORIZON], share_BT[:, :HORIZON]
        queries_B = sees_BT.sum(-1)
        counts_B = queries_B == HORIZON
    alpha_BH = (mass_BHT * sees_BT[:, None]).sum(-1) / queries_B[:, None]
    baseline_B = (share_BT * sees_BT).sum(-1) / queries_B
    return _over_samples(_sums(alpha_BH[..., None], baseline_B[:, None], counts_B[:, None]))


def null_slot_sums(mass_BHT: Tensor, mask: IntervalMask | DenseMask) -> SinkSums | None:
    """[H] sums of the null slot's mass over the first 64 queries; its baseline counts the slot."""
    keys_BT = mask.keys_per_query_BT()[:, :HORIZON]
    if keys_BT.shape[1] < HORIZON:
        return None
    counts_B = (keys_BT > 0).all(-1)
    alpha_BH = mass_BHT[..., :HORIZON].mean(-1)
    baseline_B = (1.0 / (keys_BT + 1)).mean(-1)
    return _over_samples(_sums(alpha_BH[..., None], baseline_B[:, None], counts_B[:, None]))


def first_of_keys_sums(
    mass_BHT: Tensor, null_mass_BHT: Tensor, mask: IntervalMask | DenseMask
) -> SinkSums | None:
    """[H] sums of alpha_first / (1 - alpha_null) over the same 64 queries; None for shorter rows.

    Heads whose slot leaves less than ``MIN_LEFT`` don't count: what they leave is rounding.
    """
    sees_BT = mask.sees_BT(torch.zeros_like(mask.document_start_BT))[:, :HORIZON]
    if sees_BT.shape[1] < HORIZON:
        return None
    left_BH = 1 - null_mass_BHT[..., :HORIZON].mean(-1)
    counts_BH = sees_BT.all(-1)[:, None] & (left_BH >= MIN_LEFT)
    alpha_BH = mass_BHT[..., :HORIZON].mean(-1) / left_BH
    # A uniform head's share of the first key is its slot's too.
    share_B = _uniform_share(mask, has_slot=True)[:, :HORIZON].mean(-1)
    baseline_B = share_B / (1 - share_B)
    return _over_samples(_sums(alpha_BH[..., None], baseline_B[:, None], counts_BH[..., None]))


def long_document_starts(begins_BT: Tensor, document_start_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Row index of documents' first tokens: those that begin in the row with >= 64 tokens.

    Returns (start_BK int64, exists_BK bool), K = T // 64: two such documents can't start within
    the same 64 positions, so a block of positions has one or none and no host sync is needed.
    """
    rows, length = begins_BT.shape
    blocks = length // HORIZON
    index_T = torch.arange(length, device=begins_BT.device)
    is_start_BT = begins_BT & (document_start_BT == index_T)
    # The token 63 positions on still belongs to the document.
    long_BT = torch.zeros_like(is_start_BT)
    reach = length - HORIZON + 1
    long_BT[:, :reach] = document_start_BT[:, HORIZON - 1 :] == index_T[:reach]
    marked_BT = torch.where(is_start_BT & long_BT, index_T, -1)
    # A long document starts at T - 64 at the latest: in the last whole block or before it.
    marked_BT = marked_BT[:, : blocks * HORIZON]
    start_BK = marked_BT.view(rows, blocks, HORIZON).amax(-1)
    return start_BK.clamp(min=0), start_BK >= 0


def document_sums(
    mass_BHT: Tensor,
    mask: IntervalMask | DenseMask,
    begins_BT: Tensor,
    *,
    has_slot: bool = False,
) -> SinkSums | None:
    """[H] sums of document starts' alpha, one sample a document (see the module's docstring)."""
    rows, heads, length = mass_BHT.shape
    if length < HORIZON:
        return None
    start_BK, exists_BK = long_document_starts(begins_BT, mask.document_start_BT)
    offset_h = torch.arange(HORIZON, device=mass_BHT.device)
    index_BKh = (start_BK[..., None] + offset_h).clamp(max=length - 1)
    index_BX = index_BKh.flatten(1)
    # A window shorter than the horizon hides the start from some of the queries: it doesn't count.
    sees_BX = mask.sees_BT(mask.document_start_BT).gather(1, index_BX)
    counts_BK = exists_BK & sees_BX.view_as(index_BKh).all(-1)
    mass_BHX = mass_BHT.gather(2, index_BX[:, None].expand(-1, heads, -1))
    alpha_BHK = mass_BHX.view(rows, heads, *index_BKh.shape[1:]).mean(-1)
    share_BX = _uniform_share(mask, has_slot).gather(1, index_BX)
    baseline_BK = share_BX.view_as(index_BKh).mean(-1)
    return _over_samples(_sums(alpha_BHK, baseline_BK, counts_BK))


def position_sums(
    key_mass_BHS: Tensor,
    mask: IntervalMask | DenseMask,
    positions: int,
    *,
    min_queries: int = HORIZON,
    has_slot: bool = False,
) -> SinkSums:
    """[H, P] sums of the leading keys' alpha over all queries that see them, one sample a row.

    A key counts in the rows where at least ``min_queries`` see it.
    """
    queries_BS = mask.queries_per_key_BS()[:, :positions]
    alpha_BHP = key_mass_BHS[..., :positions] / queries_BS[:, None]
    baseline_BP = _uniform_mass(mask, positions, has_slot) / queries_BS
    return _sums(alpha_BHP, baseline_BP, queries_BS >= min_queries)


def _uniform_share(mask: IntervalMask | DenseMask, has_slot: bool) -> Tensor:
    """1 / (keys that a query sees, the slot included), float32 [B, T]; 0 for empty rows."""
    keys_BT = mask.keys_per_query_BT()
    return torch.where(keys_BT > 0, 1.0 / (keys_BT + has_slot).clamp(min=1), 0.0)


def _uniform_mass(mask: IntervalMask | DenseMask, positions: int, has_slot: bool) -> Tensor:
    """Attention each leading key would get in all if every query attended uniformly, [B, P]."""
    share_BT = _uniform_share(mask, has_slot)
    sees_BTP = mask.sees_leading_BTP(min(positions, mask.num_tokens))
    return (sees_BTP * share_BT[..., None]).sum(1)


def layer_sums(
    statistics: Statistics,
    mask: IntervalMask | DenseMask,
    begins_BT: Tensor,
    positions: int,
    *,
    min_queries: int = HORIZON,
) -> dict[str, SinkSums]:
    """One layer's sums by kind; a kind without any possible sample is left out.

    positions: how many leading keys kind ``position`` has; it alone goes by ``min_queries``, for
    64-token prompts, of which only key 0 has 64 queries.
    """
    first_BHT, null_BHT = statistics.first_mass_BHT, statistics.null_mass_BHT
    slot = {"has_slot": null_BHT is not None}
    sums = {
        "first": first_key_sums(first_BHT, mask, **slot),
        "first_row": first_key_sums(first_BHT, mask, whole_row=True, **slot),
        "document": document_sums(statistics.document_mass_BHT, mask, begins_BT, **slot),
    }
    if null_BHT is not None:
        sums["null"] = null_slot_sums(null_BHT, mask)
        sums["first_of_keys"] = first_of_keys_sums(first_BHT, null_BHT, mask)
    if statistics.key_mass_BHS is not None:
        sums["position"] = position_sums(
            statistics.key_mass_BHS, mask, positions, min_queries=min_queries, **slot
        )
    return {kind: value for kind, value in sums.items() if value is not None}
