"""How much a finding may cost, and which run an arm and a seed are at that budget."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data.files import json_sha256
from train.config import RunConfig, compose
from train.data import data_of
from train.findings.base import Arm, Finding
from train.metrics import HORIZON
from train.run_folder import ADDED, flat


class Budget(NamedTuple):
    """Where findings are tried.

    overrides: before an arm's, none where runs are of the findings' own experiments. own: of such
    of a finding that has them at every budget. implied: overrides of arms that the preset has
    already, so that arms of several findings are one. seeds: at most, None for the finding's.
    seconds: of a run alone, until one was measured. decides: whether a verdict may be more than
    "not decided".
    """

    name: str
    meant_for: str
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    implied: tuple[str, ...]
    seeds: int | None
    seconds: float
    decides: bool


QUIET = ("trainer.progress=false", "tracking.figures=false", "logger.wandb=disabled")

BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(
            name="cpu",
            meant_for="a check of the machinery on CPUs: so few tokens make no sink",
            overrides=(
                *("experiment=minutes", "debug=cpu", "tokenizer.vocab_size=512"),
                "packing.context=256",
                *("trainer.max_steps=12", "tracking.validate_every=4", "schedule.warmup_steps=2"),
            ),
            own=("debug=cpu", "trainer.max_steps=12", "tracking.validate_every=4"),
            implied=("packing=causal",),
            seeds=3,
            seconds=6.0,
            decides=False,
        ),
        Budget(
            name="minutes",
            meant_for="one H200, about half a minute of it a run",
            overrides=("experiment=minutes",),
            own=(),
            implied=("packing=causal",),
            seeds=None,
            seconds=90.0,
            decides=True,
        ),
        Budget(
            name="paper",
            meant_for="the paper's own setting, as far as it is known",
            overrides=(),
            own=(),
            implied=(),
            seeds=3,
            seconds=12 * 3600.0,
            decides=True,
        ),
    )
}

NOT_COMPARED = re.compile(
    r"(run_dir|cache_dir|resume|seed|data_seed|init_from|logger\..*|corpus\.paths|"
    r"trainer\.(progress|num_workers|accelerator|precision|compile|devices|num_nodes|strategy)|"
    r"packing\.micro_batch_rows|tracking\.(figures|last_every))"
)
"""Settings in which a stored run may differ from what its arm would be now."""


class Planned(NamedTuple):
    """One run of a finding. pool: the folder of its kind. preset, own: overrides of the budget and
    of the arm, without seeds and places."""

    arm: Arm
    seed: int
    pool: str
    preset: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def slug(self) -> str:
        """Readable and unique in the pool."""
        return f"{slug_of(self.own)}_seed={self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What the run is composed of."""
        return [*self.preset, *self.own, f"seed={self.seed}", f"data_seed={self.seed}", *QUIET]

    def compose(self, extra: tuple[str, ...] = ()) -> tuple[RunConfig, dict]:
        """Its settings, typed and plain; ``extra``: overrides of places, as ``corpus.paths``."""
        return compose([*self.overrides, *extra])


def slug_of(overrides: tuple[str, ...]) -> str:
    """``packing=document``; with a hash of its own where characters had to go."""
    told = "_".join(f"{o.split('=')[0].rsplit('.', 1)[-1]}={o.split('=', 1)[1]}" for o in overrides)
    kept = re.sub(r"[^A-Za-z0-9_.=+-]", "", told)
    if kept != told:
        kept += "-" + json_sha256(list(overrides))[:4]
    return kept or "baseline"


def seeds_of(finding: Finding, budget: Budget) -> list[int]:
    """The seeds at a budget, each both ``seed`` and ``data_seed``, so that arms are paired."""
    count = finding.seeds if budget.seeds is None else min(budget.seeds, finding.seeds)
    return list(range(count))


def _is_own(finding: Finding, budget: Budget) -> bool:
    return finding.own_experiment or not budget.overrides


def preset_of(finding: Finding, budget: Budget) -> tuple[str, ...]:
    """The overrides of all its arms."""
    own = (f"experiment={finding.experiment}", *budget.own)
    return own if _is_own(finding, budget) else budget.overrides


def pool_of(finding: Finding, budget: Budget) -> str:
    """Runs of one preset lie together, whichever finding asked for them."""
    return f"{budget.name}-{finding.experiment}" if _is_own(finding, budget) else budget.name


def planned(
    finding: Finding, budget: Budget, arm: Arm, seed: int, extra: tuple[str, ...] = ()
) -> Planned:
    """The run of an arm and a seed; of an arm with ``context_of`` the data are opened to know the
    context. Raises ``UserError`` for settings that can't be."""
    own = tuple(override for override in arm.overrides if override not in budget.implied)
    if arm.context_of is not None:
        other = next(a for a in finding.arms_of(budget.name) if a.name == arm.context_of)
        own += _short_context(planned(finding, budget, other, 0, extra), extra)
    return Planned(arm, seed, pool_of(finding, budget), preset_of(finding, budget), own)


_short: dict[tuple, tuple[str, ...]] = {}


def _short_context(other: Planned, extra: tuple[str, ...]) -> tuple[str, ...]:
    """The context at which a causal query sees as many keys on average, in about as many tokens.

    Under a causal mask of n tokens a query sees (n + 1) / 2 keys on average.
    """
    key = (other.preset, other.own, extra)
    if key not in _short:
        config, _ = other.compose(extra)
        data = data_of(config)
        data.setup()
        context = max(HORIZON, 8 * round((2 * data.report.mean_keys - 1) / 8))
        # As many rows as whole micro-batches have.
        micro = config.packing.micro_batch_rows or 1
        rows = micro * max(1, round(config.packing.batch_tokens / context / micro))
        _short[key] = (f"packing.context={context}", f"packing.batch_tokens={rows * context}")
    return _short[key]


_defaults: dict = {}


def told_settings(settings: dict) -> dict:
    """What tells an arm's settings: those that aren't the default run's, by their names."""
    if not _defaults:
        _defaults.update(flat(compose([])[1]))
    return {
        name: value
        for name, value in flat(settings).items()
        if not NOT_COMPARED.fullmatch(name) and (name not in _defaults or _defaults[name] != value)
    }


def difference(stored: dict, now: dict) -> str | None:
    """The first setting in which a stored run differs from the same arm's now, as text."""
    told = told_settings(now)
    everything = flat(now)
    for name in sorted(stored.keys() | told.keys()):
        usual = _defaults.get(name, ADDED.get(name))
        before, after = stored.get(name, usual), everything.get(name, ADDED.get(name))
        if before != after:
            return f"{name} {before!r} there, {after!r} here"
    return None


LENGTHS = ("trainer.max_steps", "packing.batch_tokens", "packing.context")
"""Settings that make an arm's runs longer or shorter than its preset's; whole rows make a batch."""


def tokens_of(preset: tuple[str, ...], own: tuple[str, ...] = ()) -> int:
    """Tokens that a run trains on, of the budget's or paper's preset and an arm's overrides."""
    return _tokens((*preset, *(o for o in own if o.partition("=")[0] in LENGTHS)))


@cache
def _tokens(overrides: tuple[str, ...]) -> int:
    config, _ = compose([*overrides])
    return config.trainer.max_steps * config.packing.batch_tokens


def run_dir(plan: Planned, root: Path) -> Path:
    """Where the run's folder lies."""
    return root / plan.pool / plan.slug
