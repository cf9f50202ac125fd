"""Attention cases: masks, head counts and head dims, small ones and those of a GPU.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim, R buckets of relative distance.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.fused.tiles import Tile, Warpgroups
from kernels.masks import DenseMask, IntervalMask

PACKED = [
    [1] * 9 + [2] + [3] + [4] + [5] * 30 + [6] * 28,
    [1] * 66 + [2] * 1 + [-1] * 3,
]
"""Two rows of 70 tokens: documents of one token in a row, one over a block's edge, padding."""

PINNED = [[0, *row[1:]] for row in PACKED]


def _documents(rows, **settings) -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor(rows), **settings)


def _any_intervals(pinned: int = 0, T: int = 70, seed: int = 3) -> IntervalMask:
    """Intervals at random: later keys alone, the pinned key alone, nothing; none monotone."""
    generator = torch.Generator().manual_seed(seed)
    ends_2BT = torch.randint(0, T + 1, (2, 2, T), generator=generator, dtype=torch.int32)
    start_BT, stop_BT = ends_2BT.amin(0), ends_2BT.amax(0)
    start_BT[:, ::7] = stop_BT[:, ::7] = 0
    start_BT[:, ::9] = stop_BT[:, ::9] = 20
    return IntervalMask(
        start_BT=start_BT,
        stop_BT=stop_BT,
        document_start_BT=torch.arange(T, dtype=torch.int32).repeat(2, 1) // 5 * 5,
        pinned=pinned,
    )


def _long_rows(B: int, T: int, **settings) -> IntervalMask:
    """Packed rows of documents of 1, ..., T // 2 tokens, most of them short, and some padding."""
    generator = torch.Generator().manual_seed(5)
    log_lengths_BN = torch.rand(B, T, generator=generator) * math.log(T / 2)
    rows = []
    for lengths in log_lengths_BN.exp().long().tolist():
        row = [n for n, length in enumerate(lengths, 1) for _ in range(length)][: T - 9]
        rows.append(row + [-1] * 9)
        if settings.get("pinned"):
            rows[-1][0] = 0
    return _documents(rows, **settings)


def _holes() -> DenseMask:
    """Bidirectional holes, a key that only itself sees, a hidden key and an empty row."""
    generator = torch.Generator().manual_seed(4)
    visible_BTS = torch.rand(2, 13, 13, generator=generator) < 0.6
    visible_BTS[:, :, 3] = False
    visible_BTS[0, 5], visible_BTS[0, 5, 5] = False, True
    visible_BTS[1, 2] = False
    document_start_BT = torch.arange(13, dtype=torch.int32).repeat(2, 1) // 4 * 4
    return DenseMask(visible_BTS=visible_BTS, document_start_BT=document_start_BT)


@dataclass
class Case:
    """One attention problem: a mask, head counts, head dims and what is added to the scores."""

    mask: IntervalMask | DenseMask
    H: int = 2
    G: int = 2
    D: int = 8
    E: int = 8
    null: str = ""
    slopes: bool = False
    buckets: int = 0
    bias: float = 0.0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves with gradients, by argument name; scores of a few units, so P is far from flat.

        The numbers are multiples of 1/16 below 16, so that every dtype holds them exactly: results
        in two dtypes differ by what was computed, not by what was put in.
        """
        generator = torch.Generator().manual_seed(0)
        B, T = self.mask.document_start_BT.shape
        shapes = {
            "q_BTHD": (B, T, self.H, self.D),
            "k_BTGD": (B, T, self.G, self.D),
            "v_BTGE": (B, T, self.G, self.E),
        }
        if self.null:
            shapes["null_logit"] = {"H": (self.H,), "BHT": (B, self.H, T)}[self.null]
        if self.slopes:
            shapes["slopes_H"] = (self.H,)
        if self.buckets:
            shapes["bias_HR"] = (self.H, self.buckets)
        leaves = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        leaves["q_BTHD"] *= 2
        if self.slopes:
            leaves["slopes_H"] /= 4
        return {
            name: (leaf * 16).round().div(16).to(dtype).requires_grad_()
            for name, leaf in leaves.items()
        }


INTERVAL_CASES = {
    "causal-T63": Case(IntervalMask.causal(2, 63)),
    "causal-T1": Case(IntervalMask.causal(3, 1)),
    "causal-T111-D96-E24-grouped": Case(IntervalMask.causal(1, 111), H=4, G=2, D=96, E=24),
    "causal-T130-one_group": Case(IntervalMask.causal(1, 130), H=3, G=1),
    "causal-D24-E5": Case(IntervalMask.causal(2, 17), D=24, E=5),
    "causal-null_H": Case(IntervalMask.causal(2, 70), null="H"),
    "causal-null_BHT-grouped": Case(IntervalMask.causal(2, 70), H=4, G=2, null="BHT"),
    "causal_across": Case(_documents(PACKED, causal_across=True)),
    "documents": Case(_documents(PACKED)),
    "documents-grouped-D96": Case(_documents(PACKED), H=4, G=2, D=96),
    "documents-null_BHT": Case(_documents(PACKED), null="BHT"),
    "pinned": Case(_documents(PINNED, pinned=1)),
    "pinned-null_H": Case(_documents(PINNED, pinned=1), null="H"),
    "window-hides_key_0": Case(IntervalMask.causal(1, 150).window(5)),
    "window-documents-null_H": Case(_documents(PACKED).window(7), null="H"),
    "window-pinned": Case(_documents(PINNED, pinned=1).window(6)),
    "prefix": Case(IntervalMask.causal(1, 70).prefix(66)),
    "prefix-documents": Case(_documents(PACKED).prefix(4)),
    "padding_row-null_BHT": Case(_documents([[1] * 5, [-1] * 5]), null="BHT"),
    "any_intervals": Case(_any_intervals()),
    "any_intervals-pinned-null_BHT": Case(_any_intervals(pinned=1), null="BHT"),
}

REFERENCE_CASES = {
    "holes": Case(_holes()),
    "holes-null_BHT-grouped": Case(_holes(), H=4, G=2, null="BHT"),
    "slopes": Case(_documents(PACKED), slopes=True, null="H"),
    "bias": Case(IntervalMask.causal(1, 140), buckets=32),
    "bias-slopes-holes": Case(_holes(), buckets=5, slopes=True),
}


class GpuCase(NamedTuple):
    """A case of real size; tiles by kernel name, the table's where none is given."""

    name: str
    dtype: torch.dtype
    case: Case
    tiles: dict[str, Tile | Warpgroups]


def _hopper(groups: int, rows: int) -> dict[str, Warpgroups]:
    """Hopper's kernels: one warpgroup a program, products left in flight, or as many as fit."""
    overlap = groups == 1
    return {
        "forward": Warpgroups(groups=groups, rows=rows, stages=2),
        "query": Warpgroups(groups=groups, rows=64, stages=2, overlap=overlap),
        "key": Warpgroups(groups=min(groups, 2), rows=64, stages=2, overlap=overlap),
    }


PORTABLE = {
    "forward": Tile(queries=128, keys=64, warps=8, stages=2),
    "query": Tile(queries=128, keys=64, warps=8, stages=2),
    "key": Tile(queries=64, keys=128, warps=8, stages=2),
    "key_mass": Tile(queries=64, keys=128, warps=8, stages=2),
}


def _gpu_cases() -> list[GpuCase]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    causal_D64 = Case(IntervalMask.causal(2, 1024), 4, 4, 64, 64)
    causal_D96 = Case(IntervalMask.causal(2, 1000), 6, 2, 96, 96)
    causal_D128 = Case(IntervalMask.causal(2, 2048), 4, 2, 128, 128)
    causal_D256 = Case(IntervalMask.causal(1, 1024), 4, 4, 256, 256)
    short_D256 = Case(IntervalMask.causal(1, 512), 4, 4, 256, 256, null="H")
    documents_D64 = Case(_long_rows(2, 1024), 4, 4, 64, 64)
    documents_null = Case(_long_rows(2, 1024), 4, 4, 64, 64, null="BHT")
    across_D40 = Case(_long_rows(2, 1000, causal_across=True), 4, 2, 40, 40)
    documents_slopes = Case(_long_rows(2, 1000), 4, 4, 80, 48, slopes=True)
    pinned_D128 = Case(_long_rows(2, 1024, pinned=1).window(100), 4, 4, 128, 128, null="H")
    any_D16 = Case(_any_intervals(pinned=1, T=1024), 4, 2, 16, 256)
    any_D64 = Case(_any_intervals(pinned=1, T=1020), 4, 2, 64, 64)
    prefix_D24 = Case(IntervalMask.causal(2, 17).prefix(9), 4, 4, 24, 40)
    prefix_D96 = Case(IntervalMask.causal(2, 260).prefix(200), 4, 4, 96, 96)
    one, two, three = _hopper(1, 64), _hopper(2, 128), _hopper(3, 128)
    return [
        GpuCase("causal-D64", bf16, causal_D64, {}),
        GpuCase("causal-D64-portable", bf16, causal_D64, PORTABLE),
        GpuCase("causal-D64-hopper_3", bf16, causal_D64, three),
        GpuCase("causal-T1000-D96-grouped", bf16, causal_D96, {}),
        GpuCase("causal-T1000-D96-grouped-hopper_1", bf16, causal_D96, one),
        GpuCase("causal-T2048-D128-grouped-fp16-hopper_2", fp16, causal_D128, two),
        GpuCase("causal-D256-fp16", fp16, causal_D256, {}),
        GpuCase("causal-T512-D256-null_H-fp32", fp32, short_D256, {}),
        GpuCase("documents-D64-fp32", fp32, documents_D64, {}),
        GpuCase("documents-D64-null_BHT", bf16, documents_null, {}),
        GpuCase("documents-D64-null_BHT-hopper_1", bf16, documents_null, one),
        GpuCase("documents-T1000-D80-E48-slopes", bf16, documents_slopes, {}),
        GpuCase("documents-D64-null_BHT-portable", bf16, documents_null, PORTABLE),
        GpuCase("causal_across-D40-portable", bf16, across_D40, PORTABLE),
        GpuCase("pinned-window-D128-null_H", bf16, pinned_D128, {}),
        GpuCase("pinned-window-D128-null_H-hopper_1", bf16, pinned_D128, one),
        GpuCase("any_intervals-pinned-D16-E256", bf16, any_D16, {}),
        GpuCase("any_intervals-pinned-T1020-D64-fp16-hopper_3", fp16, any_D64, three),
        GpuCase("prefix-T17-D24-E40", bf16, prefix_D24, {}),
        GpuCase("prefix-T260-D96-hopper_2", bf16, prefix_D96, two),
    ]


GPU_CASES = {case.name: case for case in _gpu_cases()}
"""By name; each costs a GPU the compilation of three or four kernels. hopper_3: Hopper's kernels
with three warpgroups, whatever the table says; bf16 unless it says otherwise."""
