"""What the kernel must show, restated with what a run measured.

All ratios are of forward and backward together. ``basic`` is ``sinklab+stats``, the level training
runs at; a ratio like flex / basic says how many times faster ours is, statistics included.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from kernels.bench.check import MAX_MASS_ERROR

Record = dict[str, Any]
"""A contender's object in the JSON."""

OFF, BASIC, FULL = "sinklab", "sinklab+stats", "sinklab+full"

CUDNN_TARGETS = {
    (32, 12, 2048, 64): (1.00, 1.00),
    (8, 12, 8192, 64): (1.00, 1.08),
    (16, 12, 2048, 128): (1.10, 1.15),
}
"""Target and floor of basic / cudnn, causal, by B, H, T, D."""


class Claim(NamedTuple):
    """One line of the closing block.

    bound: the target, with its direction. measured: None if the run has no such shape. where: the
    shape that decides. status: ``met``, ``floor``, ``MISSED`` or ``not measured``.
    """

    what: str
    bound: str
    measured: float | None
    where: str
    status: str


class Results:
    """A run's records by shape, mask and implementation."""

    def __init__(self, records: list[Record]):
        self.cases: dict[tuple, dict[str, Record]] = {}
        for record in records:
            shape = tuple(record["shape"])
            # Under grouped heads a shape is another case: nothing is claimed of it.
            groups = record.get("groups", shape[1])
            key = (shape, groups, record["mask"], record.get("dtype", "bf16"))
            self.cases.setdefault(key, {})[record["implementation"]] = record

    def ratio(self, case: tuple, over: str, under: str, field: str = "total_ms") -> float | None:
        """``over``'s figure divided by ``under``'s; None if either is missing."""
        records = self.cases.get(case, {})
        if over not in records or under not in records:
            return None
        above, below = records[over][field], records[under][field]
        return above / below if above is not None and below else None

    def ratios(
        self, over: str, under: str, wanted: Callable[[tuple, str], bool]
    ) -> dict[str, float]:
        """Ratio of total times by label of the case, for cases whose shape and mask are wanted."""
        found = {}
        for case in self.cases:
            shape, groups, mask, dtype = case
            ratio = self.ratio(case, over, under)
            if groups == shape[1] and dtype == "bf16" and wanted(shape, mask) and ratio is not None:
                found[_label(shape, mask)] = ratio
        return found


def claims(records: list[Record]) -> list[Claim]:
    """Every target of the kernel's specification, in its order."""
    results = Results(records)
    listed = [_against_cudnn(results, shape) for shape in CUDNN_TARGETS]
    for what, under, over, least, wanted in (
        ("flex / basic, causal, D < 128", BASIC, "flex", 1.25, lambda s, m: s[3] < 128),
        ("flex / basic, causal, D >= 128", BASIC, "flex", 1.15, lambda s, m: s[3] >= 128),
        ("flash / basic, causal", BASIC, "flash", 1.4, lambda s, m: True),
    ):
        ratios = results.ratios(over, under, lambda s, m, w=wanted: m == "causal" and w(s, m))
        listed.append(_worst(what, ratios, operator.ge, least))
    documents = results.ratios("flex", BASIC, lambda s, m: m == "documents")
    listed.append(_worst("flex / basic, documents", documents, operator.ge, 1.4))

    basic = results.ratios(BASIC, OFF, lambda s, m: True)
    median = {"all shapes": statistics.median(basic.values())} if basic else {}
    listed.append(_worst("basic / off, median", median, operator.le, 1.02))
    listed.append(_worst("basic / off, worst", basic, operator.le, 1.03))
    full = results.ratios(FULL, OFF, lambda s, m: True)
    listed.append(_worst("full / off, worst", full, operator.le, 1.05))

    listed.append(_worst("time per FLOP, D 96 / D 128", _head_dim_96(results), operator.le, 1.15))
    errors = {
        _label(tuple(record["shape"]), record["mask"]): record["mean_mass_error"]
        for record in records
        if record["implementation"] in (BASIC, FULL) and record.get("mean_mass_error") is not None
    }
    what = "largest error of a mean mass"
    listed.append(_worst(what, errors, operator.le, MAX_MASS_ERROR))
    listed.append(_worst("peak memory at 16k, basic / flash", _memory(results), operator.le, 1.05))
    return listed


def _label(shape: tuple, mask: str) -> str:
    return f"{','.join(map(str, shape))} {mask}"


def _against_cudnn(results: Results, shape: tuple[int, ...]) -> Claim:
    target, floor = CUDNN_TARGETS[shape]
    ratio = results.ratio((shape, shape[1], "causal", "bf16"), BASIC, "cudnn")
    bound = f"<= {target:.2f} (floor {floor:.2f})"
    status = "not measured"
    if ratio is not None:
        status = "met" if ratio <= target else "floor" if ratio <= floor else "MISSED"
    return Claim("basic / cudnn", bound, ratio, _label(shape, "causal"), status)


def _worst(
    what: str, measured: dict[str, float], holds: Callable[[float, float], bool], bound: float
) -> Claim:
    """The claim at the shape where it is weakest."""
    sign = ">=" if holds is operator.ge else "<="
    text = f"{sign} {bound:g}"
    if not measured:
        return Claim(what, text, None, "", "not measured")
    weakest = min if holds is operator.ge else max
    where = weakest(measured, key=measured.get)
    value = measured[where]
    return Claim(what, text, value, where, "met" if holds(value, bound) else "MISSED")


def _head_dim_96(results: Results) -> dict[str, float]:
    """Time per FLOP of head dim 96 over that of 128, at equal rows, heads and length."""
    found = {}
    for (shape, groups, mask, dtype), records in results.cases.items():
        wider = ((*shape[:3], 128), groups, mask, dtype)
        is_pair = shape[3] == 96 and mask == "causal" and shape[2] == 2048
        other = results.cases.get(wider, {})
        if is_pair and BASIC in records and BASIC in other:
            ratio = records[BASIC]["total_ms"] / other[BASIC]["total_ms"]
            found[_label(shape, mask)] = ratio * 128 / 96
    return found


def _memory(results: Results) -> dict[str, float]:
    found = {}
    for case in results.cases:
        shape, _, mask, _ = case
        ratio = results.ratio(case, BASIC, "flash", "peak_mib")
        if shape[2] == 16384 and mask == "causal" and ratio is not None:
            found[_label(shape, mask)] = ratio
    return found
