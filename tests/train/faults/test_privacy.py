"""The rows of the fault table about keys, home and machine: none is in a run folder."""

import json
import logging
import os
import shutil

import pytest
import wandb

from tests.train.faults.injections import bad_loss
from train.runs import load_run

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_no_key_no_home_and_no_machine_in_a_run_folder(train, cache_dir, tmp_path, monkeypatch):
    home = tmp_path / "home" / "anna"
    shutil.copytree(cache_dir, home / "cache")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("socket.gethostname", lambda: "annas-machine")
    run = home / "run"
    here = (f"cache_dir={home}/cache", f"run_dir={run}", "hydra.job.name=hf_abcdefgh")
    monkeypatch.setattr("sys.argv", ["train", "debug=cpu", *here, f"key={KEY}"])
    settings = ("trainer.max_steps=2", f"cache_dir={home}/cache")
    assert train(*settings, run_dir=run) == 0
    told = json.loads((run / "provenance.json").read_text())["starts"][0]["command"]
    assert "run_dir=~/run" in told
    assert load_run(run).config.cache_dir == f"{home}/cache"
    assert (run / "wandb").exists()
    for path in (path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for secret in (str(home), KEY, "hf_abcdefgh", "annas-machine"):
            assert secret.encode() not in content, (path, secret)
    # Equal on every machine, so the run goes on in its folder.
    assert train("trainer.max_steps=3", settings[1], "resume=true", run_dir=run) == 0


@pytest.mark.parametrize("in_time", [True, False])
def test_no_home_in_what_wandb_says_of_a_stopped_run(train, tmp_path, monkeypatch, in_time):
    home = tmp_path / "home" / "anna"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    bad_loss(float("nan"))(monkeypatch)
    if not in_time:
        monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", lambda *_, **__: None)
    run = home / "run"
    assert train("trainer.max_steps=8", run_dir=run) == 2
    # Not left to the end of the process.
    assert (wandb.run is None) == in_time
    try:
        raise RuntimeError(f"{home}/x")
    except RuntimeError:
        # As W&B's own threads do until the process ends, if it didn't finish.
        logging.getLogger("wandb.sdk.lib.asyncio_manager").exception("Uncaught of %s", home)
    monkeypatch.undo()
    wandb.finish()
    (log,) = run.glob("wandb/offline-run-*/logs/debug.log")
    told = log.read_text()
    assert str(home) not in told
    assert ("Uncaught of ~" in told and "RuntimeError: ~/x" in told) != in_time


def test_homes_and_keys_of_others_are_left_alone(monkeypatch):
    from train.privacy import private, with_home

    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("A_TOKEN", "1")
    anna = ["/home/anna/x", "/home/anna", "/home/annabel/x", 1, None]
    values = {"a": anna, "b": "s=[/home/anna,/home/anna/]"}
    hidden = {"a": ["~/x", "~", "/home/annabel/x", 1, None], "b": "s=[~,~/]"}
    assert private(values) == hidden
    assert with_home(hidden)["a"] == values["a"]
    assert os.path.expanduser("~") == "/home/anna"
