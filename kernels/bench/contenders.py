"""Everything that is timed, by name: ours at each level of statistics first, then the others."""

from __future__ import annotations

import torch

from kernels.attention import sink_attention
from kernels.attention.statistics import StatisticsLevel
from kernels.bench.alternatives import MATERIALISED, SECOND_PASS
from kernels.bench.backends import CUDNN, FLASH, FLASH_VARLEN, FLEX
from kernels.bench.cases import Case, Inputs, Problem
from kernels.bench.contender import BASIC, Bind, Call, Contender, Forward
from kernels.errors import UserError

IMPLEMENTATION = "triton"
"""The implementation of ``sink_attention`` that is timed."""


def _ours(name: str, level: StatisticsLevel, *gives: str) -> Contender:
    """As training calls it: q, k, v as projections leave them, key mass from the backward pass."""

    def prepare(problem: Problem, variant: str) -> Bind:
        case = problem.case

        def bind(inputs: Inputs) -> Call:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
            tap_BHS = None
            if level is not StatisticsLevel.off:
                shape = (case.batch, case.heads, case.length)
                tap_BHS = torch.zeros(shape, device=problem.device, requires_grad=True)
                leaves.append(tap_BHS)

            def forward() -> Forward:
                output = sink_attention(
                    *leaves[:3],
                    problem.mask,
                    statistics=level,
                    key_mass_tap_BHS=tap_BHS,
                    implementation=IMPLEMENTATION,
                )
                measured = {"lse_BHT": output.lse_BHT.detach()}
                if output.statistics is not None:
                    measured |= output.statistics._asdict()
                present = {name: value for name, value in measured.items() if value is not None}
                return Forward(output.out_BTHE, present)

            return Call(forward, tuple(leaves), inputs.grad_out_BTHD, lambda x: x)

        return bind

    return Contender(
        name=name,
        variants=lambda case: ("BTHD",),
        prepare=prepare,
        compiles=True,
        gives=("lse_BHT", *gives),
    )


OURS = [
    _ours("sinklab", StatisticsLevel.off),
    _ours("sinklab+stats", StatisticsLevel.basic, *BASIC),
    _ours("sinklab+full", StatisticsLevel.full, *BASIC, "entropy_BHT"),
]
ALTERNATIVES = [MATERIALISED, SECOND_PASS]
CONTENDERS = {
    contender.name: contender
    for contender in [*OURS, CUDNN, FLASH, FLEX, FLASH_VARLEN, *ALTERNATIVES]
}


def taking_part(case: Case, names: list[str]) -> list[Contender]:
    """Who is timed on a case: those named, or all, less those that are not for its mask."""
    left_out = set() if case.alternatives or names else {c.name for c in ALTERNATIVES}
    return [
        contender
        for contender in CONTENDERS.values()
        if contender.name in (names or CONTENDERS)
        and contender.name not in left_out
        and contender.variants(case)
    ]


def check_names(names: list[str]) -> list[str]:
    """The names, or ``UserError`` for one that doesn't exist."""
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise UserError(f"--only must be some of {', '.join(CONTENDERS)}, got {unknown[0]!r}")
    return names
