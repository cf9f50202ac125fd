"""Search the tile shapes of the fused kernels on this card and write the committed table.

Every kernel, mask class and level meets the same candidates, so that what a level costs is not a
matter of how long its tiles were searched. Candidates that don't compile or don't fit are left out.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.fused import launch
from kernels.attention.fused.op import backward_outputs, forward_outputs
from kernels.attention.fused.tensors import BackwardCall, MaskTensors
from kernels.attention.fused.tiles import (
    TABLE,
    Tile,
    Warpgroups,
    capability_of,
    override_tiles,
    tile_as_json,
)
from kernels.bench.ahead import COMPILERS, in_processes
from kernels.bench.cases import Case, Problem, make_problem
from kernels.bench.timing import Captured, Clock, interleaved
from kernels.errors import require

HEAD_DIMS = (64, 96, 128)
LENGTHS = (512, 2048, 8192)


class Search(NamedTuple):
    """One entry of the table to be: a kernel at a level on a shape and mask."""

    kernel: str
    level: str
    case: Case


def searches() -> Iterator[Search]:
    """Everything the table holds, shape by shape."""
    levels = {"forward": ("off", "basic", "full"), "query": ("off",), "key": ("off", "basic")}
    for head_dim, length, mask in itertools.product(HEAD_DIMS, LENGTHS, ("causal", "documents")):
        tokens = 65536 if head_dim == 64 else 32768
        case = Case(batch=tokens // length, heads=12, length=length, head_dim=head_dim, mask=mask)
        for kernel, kernel_levels in levels.items():
            for level in kernel_levels:
                yield Search(kernel, level, case)
        yield Search("key_mass", "basic", case)


def candidates(kernel: str, head_dim: int) -> list[Tile | Warpgroups]:
    """Tiles to try: those that were not far behind on any shape of a wider search."""

    def tile(
        queries: int, keys: int, warps: int, stages: int, registers: int | None = None
    ) -> Tile:
        return Tile(queries=queries, keys=keys, warps=warps, stages=stages, registers=registers)

    def groups(groups: int, rows: int, stages: int, overlap: bool = False) -> Warpgroups:
        return Warpgroups(groups=groups, rows=rows, stages=stages, overlap=overlap)

    if kernel == "forward":
        wide = [groups(3, 128, 2), groups(3, 128, 3)] if head_dim == 64 else [groups(2, 128, 2)]
        portable = [tile(64, 64, 4, 3), tile(64, 64, 4, 2), tile(128, 64, 4, 3)]
        if head_dim == 64:
            # Four programs at a time on Hopper; the compiler's choice is often 140 registers.
            portable += [tile(64, 64, 4, 3, 128), tile(64, 64, 4, 2, 128)]
        return [*portable, groups(1, 128, 2), groups(1, 64, 2), groups(1, 64, 3), *wide]
    if kernel == "query":
        portable = [tile(64, 64, 4, 3), tile(64, 64, 4, 4), tile(64, 32, 4, 3)]
        single = groups(1, 64, 2, overlap=True)
        return [*portable, single, groups(2, 64, 3), groups(3, 64, 3)]
    if kernel == "key_mass":
        return [tile(64, 64, 4, 3), tile(128, 64, 4, 3), tile(64, 128, 8, 3)]
    portable = [tile(64, 64, 4, 3), tile(64, 64, 4, 2), tile(32, 64, 4, 2)]
    single = [groups(1, 64, 2), groups(1, 64, 2, overlap=True)]
    return [*portable, *single, groups(2, 64, 2), groups(2, 64, 3)]


def calls_of(problem: Problem, search: Search) -> Callable[[], list[Tensor]]:
    """The kernel of a search on a problem's inputs, with the tiles in force when it is called.

    It returns what the kernel filled, the same tensors every time.
    """
    q, k, v, dout = problem.inputs(0)

    def mask() -> MaskTensors:
        # Anew for each call, as the operators do: its tables are part of the call.
        return MaskTensors(
            problem.mask.start_BT,
            problem.mask.stop_BT,
            problem.mask.document_start_BT,
            problem.mask.pinned,
            problem.mask.is_causal,
            problem.mask.one_document,
        )

    scale, level = problem.scale, search.level
    outputs = forward_outputs(q, v, None, level, problem.mask.one_document)

    def forward() -> list[Tensor]:
        launch.forward(q, k, v, mask(), None, None, scale, level, outputs)
        return list(outputs)

    if search.kernel == "forward":
        return forward
    forward()
    out, lse = outputs.out_BTHE, outputs.lse_BHT
    mass = torch.empty_like(lse)

    def key_mass() -> list[Tensor]:
        launch.key_mass(q, k, lse, mask(), None, scale, mass)
        return [mass]

    if search.kernel == "key_mass":
        return key_mass
    grads = backward_outputs(q, k, v, lse, level)
    rows = (torch.empty_like(lse), grads.shift_BHT)

    def backward(half: Callable) -> None:
        call = BackwardCall(dout, None, q, k, v, out, lse, mask(), None, scale, level != "off")
        half(call, grads, *rows)

    def query() -> list[Tensor]:
        backward(launch.query_gradients)
        return [grads.dq_BTHD, grads.shift_BHT]

    def key() -> list[Tensor]:
        backward(launch.key_gradients)
        return [grads.dk_BTGD, grads.dv_BTGE, grads.key_mass_BHT]

    if search.kernel == "query":
        return query
    query()
    return key


def compile_share(index: int, device: torch.device) -> None:
    """Run every ``COMPILERS``-th candidate once on a small batch, so that Triton's cache has it."""
    everything = [
        (search, tile)
        for search in searches()
        # Lengths share their programs.
        if search.case.length == LENGTHS[0]
        for tile in candidates(search.kernel, search.case.head_dim)
    ]
    for search, tile in everything[index::COMPILERS]:
        problem = make_problem(replace(search.case, batch=1), device)
        with suppress(Exception), override_tiles(**{search.kernel: tile}):
            calls_of(problem, search)()


def tune(device: torch.device, clock: Clock, rounds: int) -> None:
    """Search, print a line an entry, and write ``TABLE`` with this card's entries renewed."""
    in_processes("kernels.bench.tune", [])
    card = torch.cuda.get_device_name(device)
    entries = []
    problem = None
    for search in searches():
        if problem is None or problem.case != search.case:
            problem = make_problem(search.case, device)
        timings = _time(search, problem, clock, rounds)
        for tile in _best_of_each_kind(timings):
            entries.append(
                {
                    "card": card,
                    "capability": capability_of(device),
                    "kernel": search.kernel,
                    "head_dim": search.case.head_dim,
                    "tokens": search.case.length,
                    "mask": "causal" if search.case.mask == "causal" else "interval",
                    "level": search.level,
                    "ms": round(timings[tile], 4),
                    "tile": tile_as_json(tile),
                }
            )
        shown = sorted(timings.items(), key=lambda item: item[1])
        line = " | ".join(f"{ms:.3f} {_short(tile)}" for tile, ms in shown)
        print(f"{search.case.label} {search.kernel} {search.level}: {line}", flush=True)
    others = []
    if TABLE.exists():
        others = [entry for entry in json.loads(TABLE.read_text()) if entry["card"] != card]
    lines = ",\n".join(json.dumps(entry) for entry in [*others, *entries])
    TABLE.write_text(f"[\n{lines}\n]\n")


def _time(
    search: Search, problem: Problem, clock: Clock, rounds: int
) -> dict[Tile | Warpgroups, float]:
    """Median milliseconds of each candidate that runs and gives what the first one does."""
    kernel = calls_of(problem, search)
    calls: dict[Tile | Warpgroups, Captured] = {}
    wanted: list[Tensor] = []
    for tile in candidates(search.kernel, search.case.head_dim):

        def call(tile=tile) -> list[Tensor]:
            with override_tiles(**{search.kernel: tile}):
                return kernel()

        # Recorded, so that a host busy with something else slows no short kernel down.
        with suppress(Exception):
            captured = Captured(call)
            given = call()
            wanted = wanted or [x.clone() for x in given]
            if _agree(given, wanted):
                calls[tile] = captured
            else:
                print(f"{search.case.label} {search.kernel}: {_short(tile)} is wrong, left out")
    require(bool(calls), "tiles", "must have one that runs", f"none for {search}")
    named = [(str(index), call) for index, call in enumerate(calls.values())]
    timed = interleaved(named, clock=clock, rounds=rounds)
    return {tile: timed[str(index)].median for index, tile in enumerate(calls)}


def _agree(given: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether all tensors are the same to about the rounding of bf16."""
    errors = [torch.linalg.vector_norm(a.double() - b) for a, b in zip(given, wanted, strict=True)]
    norms = [torch.linalg.vector_norm(b.double()) for b in wanted]
    return all(bool(error <= 0.01 * norm) for error, norm in zip(errors, norms, strict=True))


def _best_of_each_kind(timings: dict[Tile | Warpgroups, float]) -> list[Tile | Warpgroups]:
    """The portable program's best, for calls that Hopper's can't run, and Hopper's if faster."""
    kinds = [[tile for tile in timings if isinstance(tile, kind)] for kind in (Tile, Warpgroups)]
    portable, hopper = (min(kind, key=timings.get, default=None) for kind in kinds)
    if hopper is not None and (portable is None or timings[hopper] < timings[portable]):
        return [tile for tile in (portable, hopper) if tile is not None]
    return [portable]


def _short(tile: Tile | Warpgroups) -> str:
    if isinstance(tile, Warpgroups):
        return f"{tile.groups} groups x{tile.rows} s{tile.stages}"
    cap = "" if tile.registers is None else f" r{tile.registers}"
    return f"{tile.queries}x{tile.keys} w{tile.warps} s{tile.stages}{cap}"


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), torch.device("cuda"))
