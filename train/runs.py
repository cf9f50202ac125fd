"""Runs read back from their folders, finished or still training.

    run = load_run("runs/default/seed=1-0a1b2c3d")
    run.metrics(), run.sinks(), run.probes()       what was measured, as DataFrames
    run.at(128).model                              the decoder as of step 128
    run.attention("It was", layer=2, head=0)       an attention matrix by the tokens' text
    differences([run, other]), arm_label([run, other])     the settings in which runs differ

Nothing in a folder is executed or unpickled.
"""

from __future__ import annotations

import io
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml

from data.module import TokenDataModule
from kernels.errors import UserError, require
from models.checkpoints import read_description
from train.arms import arm_label, differences
from train.checkpoint import Checkpoint
from train.config import RunConfig, restored
from train.data import data_of
from train.kinds import GROUPS, told_kind
from train.metrics import THRESHOLDS
from train.run_folder import RunFolder, arm_hash
from train.sink_table import threshold_name

__all__ = ["Checkpoint", "Run", "arm_label", "differences", "load_run"]

SINK_COLUMNS = (
    *("step", "tokens", "layer", "head", "key", "position", "count", "alpha", "baseline"),
    *(f"over_{threshold_name(eps)}" for eps in THRESHOLDS),
    "alpha_kind",
)
"""Columns of ``Run.sinks()``."""

PROBE_COLUMNS = (
    *("run", "step", "tokens", "probe", "name", "input", "layer", "head", "position"),
    *("value", "probe_set", "alpha_kind"),
)
"""Columns of ``Run.probes()``."""


def load_run(path: Path | str) -> Run:
    """The run in a folder, which may still be training.

    Raises ``UserError`` naming what is missing or damaged if it is no run folder.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{folder.path} must be a run folder, and there is no such folder")
    content = _bytes(folder, folder.config)
    try:
        settings = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UserError(f"{folder.config} must be YAML: {_first_line(error)}") from error
    known = isinstance(settings, dict) and all(
        isinstance(settings.get(name), dict) for name in (*GROUPS, "packing", "model")
    )
    if not known:
        raise UserError(f"{folder.config} must hold the settings of a run")
    content = _bytes(folder, folder.provenance)
    try:
        starts = json.loads(content)
        run_id, newest = starts["run_id"], dict(starts["starts"][-1])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder.provenance} must hold a run_id and its starts") from error
    return Run(folder, settings, newest, run_id)


class Run:
    """What a run folder holds; of ``load_run``.

    path: the folder; name: its name. settings: config.yaml. provenance: the newest start of
    provenance.json. run_id: drawn at the first start. Tables are read anew at each call.
    """

    def __init__(self, folder: RunFolder, settings: dict, provenance: dict, run_id: str):
        self.folder = folder
        self.path = folder.path
        self.name = folder.path.resolve().name
        self.settings = settings
        self.provenance = provenance
        self.run_id = run_id
        self._checkpoints: dict[int, Checkpoint] = {}
        self._data: dict[Path, TokenDataModule] = {}
        self._name_kinds()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def experiment(self) -> str:
        """The experiment that the run was started as, ``default`` if none."""
        if "experiment" in self.provenance:
            return self.provenance["experiment"]
        told = [word for word in self.provenance.get("command", []) if "experiment=" in word]
        return told[-1].partition("=")[2] if told else "default"

    @property
    def seeds(self) -> tuple[int, int]:
        """``seed`` and ``data_seed``."""
        return self.settings["seed"], self.settings["data_seed"]

    @property
    def arm_hash(self) -> str:
        """Eight hex digits of the settings without seeds."""
        return arm_hash(self.settings)

    @cached_property
    def config(self) -> RunConfig:
        """The settings, typed. Raises ``UserError`` if they aren't settings of this version."""
        try:
            return restored(self.settings)
        except UserError as error:
            raise UserError(f"{self.folder.config}: {error}") from None

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a training step, all ranks together."""
        return self.settings["packing"]["batch_tokens"]

    @property
    def steps(self) -> list[int]:
        """The steps whose weights are kept so far, ascending."""
        names = (path.name for path in self.folder.last.parent.glob("step_*"))
        found = (re.fullmatch(r"step_(\d{8})", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def metrics(self) -> pd.DataFrame:
        """metrics.csv: a row a logged step, NaN where a metric wasn't due; step and tokens first.

        A line that is being written is left out.
        """
        path = self.folder.metrics
        if self.steps[1:] and not path.exists():
            raise UserError(f"{self.path} must have its {path.name}: it has weights of later steps")
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            return pd.DataFrame({"step": pd.Series(dtype=int), "tokens": pd.Series(dtype=int)})
        try:
            table = pd.read_csv(io.BytesIO(whole))
            first = table[["step", "tokens"]].astype(int)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} must be a run's metrics: {_first_line(error)}") from error
        return pd.concat([first, table.drop(columns=["step", "tokens"])], axis=1)

    def sinks(self) -> pd.DataFrame:
        """Every part of sinks/: a row a (step, layer, head, key), columns ``SINK_COLUMNS``."""
        return _parts(sorted(self.folder.sinks.glob("*.parquet")), SINK_COLUMNS)

    def probes(self) -> pd.DataFrame:
        """Every part of probes/: a row a value, columns ``PROBE_COLUMNS``.

        probe_set: digest of the text that was probed, which tells rows of several apart.
        alpha_kind: whether attention is a ``probability`` or a ``proxy`` (``train.metrics``).
        """
        return _parts(sorted(self.folder.probes.rglob("*.parquet")), PROBE_COLUMNS)

    def at(self, step: int | str) -> Checkpoint:
        """What was kept at ``step``; "last" is the latest so far.

        Raises ``UserError`` naming the kept steps if it isn't one of them.
        """
        steps = self.steps
        if step == "last" and steps:
            step = steps[-1]
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none so far"
            raise UserError(
                f"step must be one that {self.path} kept ({kept}) or last, got {step!r}"
            )
        if step not in self._checkpoints:
            self._checkpoints[step] = Checkpoint(self, step)
        return self._checkpoints[step]

    def forget(self, step: int) -> None:
        """Let go of what ``at(step)`` keeps in memory."""
        self._checkpoints.pop(step, None)

    def data(self, cache_dir: Path | str | None = None) -> TokenDataModule:
        """The run's data, set up again from its settings; kept for further calls.

        cache_dir: of tokenizers and stores; None is the run's own setting.
        Raises ``UserError`` if the data can't be had, or are others than the run trained on.
        """
        config = self.config
        where = Path(config.cache_dir if cache_dir is None else cache_dir)
        if where not in self._data:
            data = data_of(config, cache_dir=where)
            data.setup()
            require(
                data.sha256 == self.provenance["data"]["sha256"],
                f"the data of {self.path}",
                f"must be those it trained on, sha256 {self.provenance['data']['sha256']}",
                data.sha256,
            )
            self._data[where] = data
        return self._data[where]

    def attention(
        self,
        text: str,
        layer: int,
        head: int,
        step: int | str = "last",
        bos: bool | None = None,
    ) -> pd.DataFrame:
        """The attention matrix of a head on ``text``; see ``Checkpoint.attention``."""
        return self.at(step).attention(text, layer, head, bos)

    def to_hf(self, step: int | str, path: Path | str) -> None:
        """Write a ``LlamaForCausalLM`` folder with its tokenizer; see ``Checkpoint.to_hf``."""
        self.at(step).to_hf(path)

    def _name_kinds(self) -> None:
        """Add the kinds that folders from before they were stored lack.

        A checkpoint names the attention's; of the others, settings tell.
        """
        for group in GROUPS:
            section = self.settings[group]
            if "kind" in section:
                continue
            kind = told_kind(group, section)
            if group == "attention" and self.steps:
                checkpoint = self.folder.checkpoint(self.steps[0])
                kind = read_description(checkpoint)["attention"]["kind"]
            self.settings[group] = {"kind": kind, **section}


def _bytes(folder: RunFolder, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{folder.path} is no run folder: it has no {path.name}") from error


def _parts(paths: list[Path], columns: tuple[str, ...]) -> pd.DataFrame:
    tables = []
    for path in paths:
        try:
            tables.append(pd.read_parquet(path))
        except (pa.ArrowException, OSError) as error:
            again = ""
            if path.parent.parent.name == "probes":
                again = f" (python -m scripts.probe {path.parents[2]} makes it again)"
            reason = type(error).__name__
            raise UserError(f"{path} must be an intact table{again}, got {reason}") from error
    if not tables:
        return pd.DataFrame({name: pd.Series(dtype=object) for name in columns})
    return pd.concat(tables, ignore_index=True)


def _first_line(error: Exception) -> Any:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
