"""In which settings runs differ, and what to call their arms: runs that differ in seeds only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import OmegaConf

from train.config import plain
from train.kinds import GROUPS
from train.run_folder import NOT_THE_EXPERIMENT, PARENT, SEEDS, flat

if TYPE_CHECKING:
    from train.runs import Run

FEW_SETTINGS = 3
"""Settings of a label that needs no shortening."""


def differences(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run, by its path: a column a setting that differs, then ``seed``, ``data_seed``.

    Names and values are the command line's; a setting that a run's kind hasn't is None, and is
    left out if all runs that have it agree. Weights to start from are the arm and the step of the
    parent, ``0a1b2c3d@128``.
    """
    settings = [_comparable(run) for run in runs]
    names = list(dict.fromkeys(name for one in settings for name in one if name not in SEEDS))
    different = [
        name
        for name in names
        if len({json.dumps(one[name], default=str) for one in settings if name in one}) > 1
    ]
    columns = {name: [one.get(name) for one in settings] for name in (*different, *SEEDS)}
    table = pd.DataFrame(
        {name: pd.Series(values, dtype=object) for name, values in columns.items()}
    )
    table = table.astype(dict.fromkeys(SEEDS, int))
    table.index = pd.Index([str(run.path) for run in runs], name="run")
    return table


def arm_label(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for the arm of each run by its path, made of the settings that differ.

    ``packing.mask=document, packing.bos=pinned``; the experiment's name if none does.
    """
    return {
        run.path: ", ".join(told.values()) or run.experiment
        for run, told in zip(runs, _different(runs), strict=True)
    }


def short_arm_label(runs: Sequence[Run]) -> dict[Path, str]:
    """The same, of unlike runs with no more settings than tell their arms apart.

    ``attention=softmax, +13 more``. Labels of up to ``FEW_SETTINGS`` are whole.
    """
    different = _different(runs)
    names = _telling(different)
    labels = {}
    for run, told in zip(runs, different, strict=True):
        kept = [text for name, text in told.items() if len(told) <= FEW_SETTINGS or name in names]
        more = [f"+{len(told) - len(kept)} more"] if len(kept) < len(told) else []
        labels[run.path] = ", ".join(kept + more) or run.experiment
    return labels


def _different(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of each run ``name=value`` by name, of the settings in which the runs differ."""
    different = {name for name in differences(runs).columns if name not in SEEDS}
    return [
        {
            name: f"{name}={_told(value)}"
            for name, value in _comparable(run).items()
            # What isn't set is no part of a name.
            if name in different and (value is not None or name != "init_from")
        }
        for run in runs
    ]


def _telling(different: list[dict[str, str]]) -> list[str]:
    """Names of few settings by which all are told apart that differ at all: again and again the
    one that tells most of them, the first of equals."""
    names = list(dict.fromkeys(name for told in different for name in told))

    def kinds(chosen: list[str]) -> int:
        return len({tuple(told.get(name) for name in chosen) for told in different})

    chosen: list[str] = []
    while kinds(chosen) < kinds(names):
        chosen.append(max(names, key=lambda name: kinds([*chosen, name])))
    return chosen


def _comparable(run: Run) -> dict[str, Any]:
    """What decides what a run computes, flat, settings that its folder lacks at their default."""
    settings = plain(OmegaConf.structured(run.config))
    kept = {name: value for name, value in settings.items() if name not in NOT_THE_EXPERIMENT}
    if parent := run.settings.get(PARENT):
        kept["init_from"] = f"{parent['arm']}@{parent['step']}"
    kinds = {f"{group}.kind": group for group in GROUPS}
    return {kinds.get(name, name): value for name, value in flat(kept).items()}


def _told(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
