"""The W&B workspace as code, and the files of W&B sweeps."""

import importlib.util
import itertools
import re
import sys
from operator import ne
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from data.evaluation import ProbeKind
from scripts.dashboard import build_workspace, command, panel_keys
from train.config import compose
from train.wandb_names import wandb_key

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "scripts" / "sweeps").glob("*.yaml"))


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: True)


def known_keys(readme: str) -> set[str]:
    """Keys of the metrics that the README names, those by layer included."""
    table = readme.split("| name | formula | paper |")[1].split("\n\n")[0]
    names = {"tokens", "step"}
    for name in re.findall(r"`([a-z0-9_]+/[a-z0-9_/.]+)`", table):
        ends = ("mass", "excess", "rate_030", "loss") if name.endswith("...") else ("",)
        names |= {name.removesuffix("...") + end for end in ends}
    return names | {wandb_key(f"{name}/layer_{i:02d}") for name in names for i in range(3)}


def test_the_workspace_has_three_sections_of_keys_that_runs_log():
    workspace = build_workspace("someone", "sinklab", num_layers=3)
    keys = [{k for p in s.panels for k in panel_keys(p)} for s in workspace.sections]
    pictures = {f"figures/heads_t64_{kind.value}" for kind in ProbeKind}
    assert keys[0] | keys[1] <= known_keys((ROOT / "README.md").read_text())
    assert {"sink/excess", "sink/rate_030", "val/canonical_loss"} <= keys[0]
    assert "layers/sink/mass/layer_02" in keys[1] and pictures <= keys[2]
    # As the server gets it: lines grouped by the arm over a logarithmic axis.
    spec = workspace._to_model().model_dump(by_alias=True, exclude_none=True)
    bank = spec["spec"]["section"]["panelBankConfig"]["sections"]
    excess = bank[0]["panels"][0]["config"]
    assert excess["metrics"] == ["sink/excess"] and excess["xLogScale"]
    assert excess["groupBy"] == "arm.value" and excess["xAxis"] == "step"
    assert [section["isOpen"] for section in bank] == [True, False, False]


def test_it_says_what_it_would_save_without_a_login(capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    assert command(["--project", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "would be saved to <your entity>/mine, but there is no working W&B login" in printed
    for name in ("sink/excess", "layers/sink/mass/layer_00", "figures/heads_t64_text"):
        assert name in printed


def test_a_dry_run_saves_nothing_and_a_login_saves(capsys, monkeypatch, logged_in):
    import wandb_workspaces.workspaces as ws

    saved = []
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self) or self)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: f"at/{self.entity}"))
    assert command(["--dry-run", "--entity", "someone"]) == 0
    assert saved == [] and "to someone/sinklab:" in capsys.readouterr().out
    assert command(["--entity", "someone", "--layers", "2"]) == 0
    assert len(saved) == 1 and capsys.readouterr().out == "saved: at/someone\n"


def test_mistakes_end_in_one_line(capsys, monkeypatch, logged_in):
    import wandb_workspaces.workspaces as ws

    def refuse(self):
        raise ConnectionError("key 0123456789")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    assert command(["--entity", "someone"]) == 2
    error = capsys.readouterr().err
    assert "W&B didn't take the workspace" in error and error.count("\n") == 1
    assert "0123456789" not in error
    assert command(["--layers", "0"]) == 2
    assert "--layers must be >= 1, got 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(["--dry-run"]) == 2
    assert "needs wandb-workspaces" in capsys.readouterr().err


def values(parameter: dict) -> list:
    """All values of a parameter of a sweep; of a range, its ends."""
    if "values" in parameter:
        return parameter["values"]
    return [parameter["value"]] if "value" in parameter else [parameter["min"], parameter["max"]]


def combinations(parameters: dict, every: bool) -> list[tuple]:
    """Runs of a grid; unless ``every``, those that differ from its first in one parameter."""
    runs = list(itertools.product(*map(values, parameters.values())))
    return [run for run in runs if every or sum(map(ne, run, runs[0])) <= 1]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_runs_of_a_sweep_compose(path, every):
    sweep = yaml.safe_load(path.read_text())
    *head, macro = sweep["command"]
    assert head[:4] == ["${env}", "${interpreter}", "-m", "train"] and macro == "${args_no_hyphens}"
    assert (ROOT / sweep["program"]).exists() and sweep["metric"]["name"] == "val/canonical_loss"
    parameters = sweep["parameters"]
    runs = combinations(parameters, every)
    assert len(runs) > 2
    composed = []
    for run in runs:
        args = {name: {"value": value} for name, value in zip(parameters, run, strict=True)}
        overrides = create_sweep_command_args({"args": args})["args_no_hyphens"]
        _, settings = compose([*head[4:], *overrides])
        composed.append(str(settings))
        for name, value in zip(parameters, run, strict=True):
            # A parameter that is a whole section would hide it in the run's config.
            node = settings
            for part in name.split("."):
                node = node[part]
            assert node == value
    assert len(set(composed)) == len(runs)


def test_the_packing_sweep_seeds_weights_and_rows_alike():
    (path,) = [path for path in SWEEPS if path.stem == "packing"]
    command = yaml.safe_load(path.read_text())["command"]
    config, _ = compose([*command[4:-1], "seed=2"])
    assert (config.seed, config.data_seed) == (2, 2)
