"""What a finding is: a paper's claim as arms, measures, the paper's numbers and a criterion.

A finding is data; ``train.findings.verdicts`` judges it, ``table`` and ``draw`` show it, and
``campaign`` makes its runs. Everything that decides a verdict is written down here before a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PRIMARY = "excess"
"""The primary outcome: the first key's mass above uniform attention, T = 64; rates stand beside."""

RATE = (
    "rates: each prompt thresholded at 0.3 by itself, then averaged over prompts, layers and heads "
    "(the released code of 2410.10781), first 64 tokens of 100 held-out documents"
)
"""How rates are aggregated here (``train.sink_table``)."""


INPUTS = (
    "Measures are `input/name`. text: the first 64 tokens of held-out documents; bos_text, "
    "eos_text: a BOS or an EOS and 63 of them; natural: of text and bos_text the one that begins "
    "as the run's own rows do; row_text and so on: rows of the context; written: text with what "
    "packing writes into rows."
)
"""What the names in criteria are of."""


class Arm(NamedTuple):
    """Runs that differ in seeds alone.

    overrides: of the budget's preset, as the command line takes them. paper: the paper's number by
    measure. context_of: another arm, whose mean number of visible keys this causal arm gets by a
    shorter context.
    """

    name: str
    overrides: tuple[str, ...] = ()
    paper: Mapping[str, float] = {}
    context_of: str | None = None


class Of(NamedTuple):
    """A measure (``train.findings.measures``) of an arm, or ``a - b``, what one is above another:
    one value a seed."""

    arm: str
    measure: str

    @property
    def measures(self) -> list[str]:
        """The measure, or that and the one to be taken from it."""
        return self.measure.split(" - ")

    def __str__(self) -> str:
        return f"{self.measure} of {self.arm}"


@dataclass(frozen=True)
class AtLeast:
    """``left >= times * right + plus``, for each pair of equal seeds, or of any two (``every``).

    strict: ``>``. right None: ``left >= plus``.
    """

    left: Of
    right: Of | None = None
    times: float = 1.0
    plus: float = 0.0
    every: bool = False
    strict: bool = False
    sign: str = field(default=">=", init=False)

    @property
    def sides(self) -> list[Of]:
        """What it compares."""
        return [side for side in (self.left, self.right) if side is not None]

    def holds(self, left: float, right: float) -> bool:
        bound = self.times * right + self.plus
        return left > bound if self.strict else left >= bound

    def __str__(self) -> str:
        sign = self.sign.rstrip("=") if self.strict else self.sign
        bound = [] if self.right is None else [f"{self.right}"]
        if self.right is not None and self.times != 1:
            bound = [f"{self.times:g} x {self.right}"]
        if self.plus or self.right is None:
            bound.append(f"{self.plus:g}")
        whose = "every seed against every seed" if self.every else "in every seed"
        return f"{self.left} {sign} {' + '.join(bound)}, {whose}"


@dataclass(frozen=True)
class AtMost(AtLeast):
    """``left <= times * right + plus``, as ``AtLeast``."""

    sign: str = field(default="<=", init=False)

    def holds(self, left: float, right: float) -> bool:
        bound = self.times * right + self.plus
        return left < bound if self.strict else left <= bound


@dataclass(frozen=True)
class Near(AtLeast):
    """``|left - right| <= plus``, as ``AtLeast``."""

    sign: str = field(default="=", init=False)

    def holds(self, left: float, right: float) -> bool:
        return abs(left - right) <= self.plus

    def __str__(self) -> str:
        return f"{self.left} = {self.right} +- {self.plus:g}, in every seed"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and when it counts as reproduced.

    direction, magnitude: all of them must hold; magnitude () has no number to be held to. effect:
    the two outcomes whose difference must be larger than what noise can tell, and whose order must
    be stable at the end of training; None for claims that aren't about a difference.
    paper_effect: that difference in the paper as one of rates, which is what its tables have; what
    is said of it rests on the noise of our rates (``train.findings.costs``). added: of a criterion
    that wasn't written down before the first runs, when, and what had been seen by then.
    """

    says: str
    direction: tuple[AtLeast, ...]
    magnitude: tuple[AtLeast, ...] = ()
    effect: tuple[Of, Of] | None = None
    paper_effect: float | None = None
    added: str | None = None

    @property
    def arms(self) -> list[str]:
        """The arms that it is about."""
        sides = [side for test in self.tests for side in test.sides]
        return list(dict.fromkeys(side.arm for side in (*sides, *(self.effect or ()))))

    @property
    def tests(self) -> tuple[AtLeast, ...]:
        return self.direction + self.magnitude


class Column(NamedTuple):
    """A column of a finding's tables: a measure, its heading, whether it is shown in per cent, and
    which of the tables it stands in, which follow each other by number."""

    measure: str
    title: str
    percent: bool = False
    table: int = 0


class Panel(NamedTuple):
    """A panel of a finding's figure.

    kind: ``points``, a value a run by arm; ``curves``, over steps by arm; ``layers``, over steps by
    layer. measures: of ``points`` up to two, else one (``layers``: excess or rate_030). label: of
    the axis that they are on. arms: what is shown of them, () is all; ``layers`` has one.
    """

    kind: str
    measures: tuple[str, ...]
    title: str
    label: str = "excess mass of the first key"
    arms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One paper's claim and all that is needed to try it.

    name: on the command line. claim, setting: sentences for the page. source: the paper and place.
    arms: at every budget but those in ``arms_at``. experiment: the paper's own preset; with
    own_experiment the runs are of it at every budget, and their noise is their own. seeds: at
    ``minutes``. unknown: what the paper doesn't tell. aggregation: how the paper's rates are made.
    undecided: why no run of ours can decide it, None if it can.
    """

    name: str
    title: str
    claim: str
    source: str
    setting: str
    aggregation: str
    arms: tuple[Arm, ...]
    arms_at: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]
    panels: tuple[Panel, ...]
    experiment: str
    own_experiment: bool = False
    seeds: int = 5
    unknown: tuple[str, ...] = ()
    undecided: str | None = None

    def arms_of(self, budget: str) -> tuple[Arm, ...]:
        """The arms at a budget."""
        return self.arms_at.get(budget, self.arms)

    def claims_of(self, budget: str) -> list[Claim]:
        """The claims whose arms are all there at a budget."""
        return [claim for claim in self.claims if self._has(budget, claim.arms)]

    def panels_of(self, budget: str) -> list[Panel]:
        """The panels whose arms are all there at a budget."""
        return [panel for panel in self.panels if self._has(budget, panel.arms)]

    def _has(self, budget: str, arms: Iterable[str]) -> bool:
        return {arm.name for arm in self.arms_of(budget)}.issuperset(arms)
