"""Tile shapes of the fused kernels, by card: a committed table, so that a run never tunes itself.

The same inputs then take the same tiles, hence the same order of sums, on every run.
``python -m kernels.bench --tune`` measures and writes the table: for each kernel the fastest tile
of either program, the portable one and Hopper's. A shape that the table doesn't hold takes the
nearest entry; a card that it doesn't hold, those of a card of its compute capability (an H200
takes an H100's), or else tiles small enough for any.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).parent / "tiles.json"
KERNELS = ("forward", "query", "key", "key_mass")
"""forward; the gradients of queries; those of keys and values; key mass where no gradient runs."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A tile of the portable kernels.

    queries, keys: rows of its two sides. warps, stages: Triton's ``num_warps`` and ``num_stages``.
    registers: a cap a thread, None for the compiler's choice.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def launch_options(self) -> dict[str, int]:
        """Triton's launch keywords."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


@dataclass(frozen=True, kw_only=True)
class Warpgroups:
    """A tile of Hopper's kernels: warpgroups of 64 rows against a shared tile of the other side.

    groups: warpgroups that compute, 1 to 3. rows: rows of the other side's tile. stages: buffers of
    such tiles. overlap: the gradient kernels leave a tile's last products in flight while the next
    tile begins. ptxas then makes the products of all groups but the first one by one.
    """

    groups: int
    rows: int
    stages: int
    overlap: bool = False

    def __post_init__(self):
        if self.groups not in (1, 2, 3) or self.stages < 1 + self.overlap:
            # With one buffer, products left in flight would wait for a copy that waits for them.
            raise ValueError(f"no program of Hopper's has this tile: {self}")

    @property
    def registers(self) -> int:
        """Registers of a computing thread of the second group and the third; the first group gets
        what they and the copying warp, which keeps 24, leave.
        """
        return {1: 0, 2: 240, 3: 160}[self.groups]

    @property
    def launch_options(self) -> dict[str, int]:
        """Triton's launch keywords; the cap fills the register file, with one program at a time of
        two or three groups, and two programs of one.
        """
        return {"num_warps": 4, "maxnreg": {1: 128, 2: 168, 3: 128}[self.groups]}


class Situation(NamedTuple):
    """What a tile is chosen by; head_dim is the larger of the query/key and the value head dim."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_tokens: int
    is_causal: bool
    level: str


_INTERPRETED = Tile(queries=32, keys=16, warps=4, stages=1)
_ANY_CARD = {
    "forward": Tile(queries=64, keys=32, warps=4, stages=2),
    "query": Tile(queries=64, keys=32, warps=4, stages=2),
    "key": Tile(queries=32, keys=64, warps=4, stages=2),
    "key_mass": Tile(queries=32, keys=64, warps=4, stages=2),
}
# fp32 is for tests; its tiles take twice the shared memory, and some cards have 99 KB of it.
_FP32 = Tile(queries=32, keys=32, warps=4, stages=1)
_WIDE_FP32 = Tile(queries=16, keys=16, warps=4, stages=1)
_overrides: dict[str, Tile | Warpgroups] = {}


def tile_for(kernel: str, situation: Situation, for_hopper: bool) -> Tile | Warpgroups:
    """The tile of one of ``KERNELS``. for_hopper: Hopper's program can run the call."""
    if kernel in _overrides:
        tile = _overrides[kernel]
        if isinstance(tile, Warpgroups) and not for_hopper:
            raise ValueError(f"Hopper's program can't run this call: {situation}")
        return tile
    if situation.device.type != "cuda":
        return _INTERPRETED
    if situation.dtype.itemsize > 2:
        return _FP32 if situation.head_dim <= 128 else _WIDE_FP32
    return _look_up(
        kernel,
        torch.cuda.get_device_name(situation.device),
        capability_of(situation.device),
        situation.head_dim,
        situation.num_tokens,
        "causal" if situation.is_causal else "interval",
        situation.level,
        for_hopper,
    )


def capability_of(device: torch.device) -> str:
    """Compute capability as the table writes it: "9.0"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


@contextmanager
def override_tiles(**tiles: Tile | Warpgroups):
    """Use these tiles by kernel name in place of the table's, for tuning and tests."""
    previous = dict(_overrides)
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)


def tile_as_json(tile: Tile | Warpgroups) -> dict:
    """As the table holds it."""
    return asdict(tile)


def tile_from_json(fields: dict) -> Tile | Warpgroups:
    """The tile of a table's entry."""
    return Warpgroups(**fields) if "groups" in fields else Tile(**fields)


@cache
def _look_up(
    kernel: str,
    card: str,
    capability: str,
    head_dim: int,
    num_tokens: int,
    mask: str,
    level: str,
    for_hopper: bool,
) -> Tile | Warpgroups:
    cards = {entry["card"] for entry in _table() if entry["capability"] == capability}
    # Of several, the same one every time.
    card = card if card in cards else min(cards, default=card)
    # The nearest larger head dim: its tiles fit in shared memory here too.
    entries = [
        entry
        for entry in _table()
        if (entry["kernel"], entry["card"], entry["mask"]) == (kernel, card, mask)
        and entry["level"] == level
        and entry["head_dim"] >= head_dim
        and (for_hopper or "groups" not in entry["tile"])
    ]
    if not entries:
        return _ANY_CARD[kernel]
    narrowest = min(entry["head_dim"] for entry in entries)
    entries = [entry for entry in entries if entry["head_dim"] == narrowest]

    def distance(tokens: int) -> float:
        return abs(math.log(tokens / num_tokens))

    nearest = min((entry["tokens"] for entry in entries), key=distance)
    entries = [entry for entry in entries if entry["tokens"] == nearest]
    return tile_from_json(min(entries, key=lambda entry: entry["ms"])["tile"])


@cache
def _table() -> list[dict]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else []
