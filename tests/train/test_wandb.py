"""What a run leaves in W&B, read back from its offline file with `wandb leet inspect`."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from PIL import Image

from train.figures import head_map_picture
from train.loggers import build_wandb_logger
from train.wandb_mode import LoggerConfig
from train.wandb_names import MAX_SCALARS, wandb_key

# One run for all tests.
pytestmark = pytest.mark.xdist_group("wandb")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OVERRIDES = (
    # The default run's kinds and number of layers, so its names, and as many as there can be.
    "model.num_layers=4",
    "packing.context=256",
    "corpus.unit=paragraphs",
    "tracking.statistics=full",
    "tracking.figures=true",
    "tracking.validate_every=2",
    "tracking.log_every=2",
    "trainer.max_steps=3",
    "seed=1",
)


def inspect(run_dir: Path, *arguments: str) -> str:
    (run,) = (run_dir / "wandb").glob("offline-run-*")
    return subprocess.run(
        ["wandb", "leet", "inspect", "--json", *arguments, str(run)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    ).stdout


@pytest.fixture(scope="module")
def offline_run(cache_dir, tmp_path_factory):
    """An offline run: its folder, its records, and its history rows by W&B's own step."""
    from train.__main__ import command

    run_dir = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        folders = [f"cache_dir={cache_dir}", f"run_dir={run_dir}"]
        assert command(["debug=cpu", *folders, *OVERRIDES]) == 0
    records = [json.loads(line) for line in inspect(run_dir).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    history = {row["_step"]: row for row in rows}
    assert len(history) == len(rows)
    return SimpleNamespace(path=run_dir, records=records, history=history)


def scalars(row: dict) -> set[str]:
    return {key for key in row if not key.startswith(("_", "figures/"))}


def test_every_metric_is_there_at_its_step_and_nothing_else(offline_run):
    with (offline_run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["step"]) for row in rows} == set(offline_run.history) == {0, 1, 2, 3}
    for row in rows:
        told = offline_run.history[int(row["step"])]
        sent = {}
        for name, value in row.items():
            if value != "" and (key := wandb_key(name)) is not None:
                sent[key] = float(value)
        assert {key: told[key] for key in scalars(told)} == pytest.approx(sent)
        assert told["step"] == told["_step"] and told["tokens"] == 1024 * told["step"]


def test_every_metric_of_the_readme_is_there(offline_run):
    table = README.split("| name | formula | paper |")[1].split("\n\n")[0]
    first_cells = " ".join(line.split(" | ")[0] for line in table.splitlines())
    named = set(re.findall(r"`([a-z0-9_]+/[a-z0-9_/.]+)`", first_cells))
    # No triggers in text, no slot in softmax, no known peak of a CPU.
    elsewhere = {"sink_null/...", "sink_of_keys/...", "perf/mfu"}
    elsewhere |= {"backcopy/non_trigger_mass", "backcopy/trigger_mass"}
    logged = set().union(*(scalars(row) for row in offline_run.history.values()))
    assert len(named - elsewhere) > 20
    for name in named - elsewhere:
        if name.endswith("..."):
            assert any(key.startswith(name[:-3]) for key in logged), name
        else:
            assert name in logged or f"layers/{name}/layer_03" in logged, name


@pytest.mark.slow
def test_the_first_page_is_short_and_layers_have_their_own_section(offline_run):
    logged = set().union(*(scalars(row) for row in offline_run.history.values()))
    first_page = {key for key in logged if not key.startswith("layers/")}
    # One more on a GPU, perf/mfu.
    assert 25 < len(first_page) < MAX_SCALARS
    assert not any(re.search(r"/layer_\d", key) for key in first_page)
    assert "layers/norm_first/massive_ratio/layer_03" in logged


def test_the_run_tells_its_arm_and_the_summary_its_end(offline_run):
    (run,) = [record["run"] for record in offline_run.records if record["type"] == "run"]
    assert re.fullmatch("[0-9a-f]{8}", run["run_group"]) and run["job_type"] == "default"
    told = json.loads(inspect(offline_run.path, "--summary"))
    arm = told["config"]["arm"]
    assert arm.startswith("debug=cpu_num_layers=4_context=256") and "seed" not in arm
    last = offline_run.history[3]
    names = [
        f"probe/t64_{probe}/{name}"
        for probe in ("text", "bos_text")
        for name in ("mass", "excess", "rate_030", "loss")
    ]
    for name in (*names, "val/canonical_loss"):
        assert told["summary"][name] == last[name]
    assert not any(key.startswith("layers/") for key in told["summary"])


def test_every_metric_can_be_plotted_over_steps(offline_run):
    metrics = [record["metric"] for record in offline_run.records if record["type"] == "metric"]
    over_steps = {
        metric["glob_name"].removesuffix("/*")
        for metric in metrics
        if metric.get("step_metric") == "step" and "glob_name" in metric
    }
    logged = set().union(*(scalars(row) for row in offline_run.history.values()))
    assert {key.split("/")[0] for key in logged - {"step", "tokens"}} == over_steps - {"figures"}


def test_head_maps_are_there_at_validations(offline_run):
    keys = {"figures/heads_t64_text", "figures/heads_t64_bos_text"}
    for step, row in offline_run.history.items():
        found = {key.removesuffix(".path") for key in row if key.endswith(".path")}
        assert (found & keys == keys) == (step in (0, 2, 3))
        for key in found & keys:
            (file,) = offline_run.path.glob(f"wandb/offline-*/files/{row[f'{key}.path']}")
            assert file.stat().st_size < 50_000
            with Image.open(file) as picture:
                assert picture.width > 300
    assert "figures/losses.path" in offline_run.history[3]


def test_a_head_map_shows_the_head_that_sinks():
    alpha_LH = np.full((2, 4), 0.05)
    alpha_LH[1, 3] = 0.95
    alpha_LH[0, 0] = np.nan
    picture = head_map_picture(alpha_LH, 0.074, "a title", "proxy")
    assert picture.dtype == np.uint8 and picture.shape[2] == 4
    # The map takes the left three quarters, the scale's bar the rest.
    rows, columns = np.nonzero(picture[..., :3].max(-1)[:, : picture.shape[1] * 3 // 4] < 60)
    corner = (rows > picture.shape[0] / 2) & (columns > picture.shape[1] / 2)
    assert corner.mean() > 0.5


@pytest.mark.parametrize(
    ("name", "key", "by_default"),
    [
        ("tokens", "tokens", True),
        ("val/own_loss", "val/own_loss", True),
        ("sink/rate_080", "sink/rate_080", True),
        ("sink/rate_080_of_means", "sink/rate_080_of_means", False),
        ("sink_null/mass", "sink_null/mass", True),
        ("sink_null/rate_080", "sink_null/rate_080", False),
        ("sink/mass/layer_11", "layers/sink/mass/layer_11", True),
        ("probe/t64_text/baseline", "probe/t64_text/baseline", False),
        ("probe/sinks/text/rate_020", "probe/sinks/text/rate_020", False),
        ("probe/sinks/context/row_mass", "probe/sinks/context/row_mass", True),
        ("probe/losses/text/loss_hidden_first", "probe/losses/text/loss_hidden_first", True),
        ("probe/t64_text_of_keys/rate_030_from_layer_2", None, False),
    ],
)
def test_names_in_wandb(name, key, by_default):
    assert wandb_key(name) == (key if by_default else None)
    assert wandb_key(name, everything=True) == (key or name)


@pytest.mark.parametrize("in_sweep", [False, True])
def test_runs_of_an_arm_share_a_group_and_an_agents_run_its_id(monkeypatch, tmp_path, in_sweep):
    given = []

    def init(**arguments):
        given.append(arguments)
        return SimpleNamespace(define_metric=lambda *args, **kwargs: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    if in_sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    base = {"seed": 0, "data_seed": 0, "packing": "causal", "trainer": {"max_steps": 2}}
    for change in ({}, {"seed": 1, "data_seed": 1}, {"packing": "document"}):
        build_wandb_logger(
            LoggerConfig(),
            "offline",
            tmp_path,
            "ours",
            base | change,
            {"alpha_kind": "probability"},
            experiment="gu60m",
            overrides=[f"{name}={value}" for name, value in change.items()],
        )
    assert {arguments["id"] for arguments in given} == {"agents" if in_sweep else "ours"}
    assert given[0]["group"] == given[1]["group"] != given[2]["group"]
    arms = [arguments["config"]["arm"] for arguments in given]
    assert arms == ["gu60m", "gu60m", "gu60m/packing=document"]
    assert given[0]["job_type"] == "gu60m"
