"""Names of run folders, and when a run may go on in one."""

import json

import pytest
import yaml

from kernels.errors import UserError
from train.going_on import drop_after, newest_weights, start_from_weights, way_on
from train.run_folder import (
    RunFolder,
    arm_hash,
    arm_name,
    experiment_hash,
    open_run_folder,
    run_name,
    write_run_files,
)


def settings(run_dir=None, resume=False, seed=0, max_steps=20) -> dict:
    return {
        "model": {"num_layers": 4},
        "trainer": {"max_steps": max_steps},
        "seed": seed,
        "run_dir": None if run_dir is None else str(run_dir),
        "resume": resume,
        "cache_dir": ".cache",
        "logger": {},
    }


def test_the_hash_depends_on_what_is_computed_only():
    assert experiment_hash(settings()) == experiment_hash(settings(run_dir="x", resume=True))
    assert experiment_hash(settings()) != experiment_hash(settings(seed=1))


def test_a_setting_that_a_kind_got_later_is_none_at_the_value_of_before(tmp_path):
    before = settings(tmp_path) | {"attention": {"kind": "sigmoid", "normalize": False}}
    now = before | {"attention": before["attention"] | {"bias": 0.0}}
    other = before | {"attention": before["attention"] | {"bias": -1.0}}
    assert experiment_hash(now) == experiment_hash(before) != experiment_hash(other)
    assert arm_hash(now) == arm_hash(before) != arm_hash(other)
    folder = RunFolder(tmp_path)
    write_run_files(folder, before, {})
    folder.last.parent.mkdir()
    folder.last.touch()
    assert open_run_folder(now | {"resume": True}, "default", [])[1]
    with pytest.raises(UserError, match=r"attention.bias must stay 0.0 when a run is resumed"):
        open_run_folder(other | {"resume": True}, "default", [])


def test_the_name_tells_the_overrides_and_ends_with_the_hash():
    name = run_name(settings(), ["optimizer.lr=0.001", "+x=[1,2]", "resume=true", "experiment=a"])
    assert name == f"lr=0.001_x=12-{experiment_hash(settings())}"
    assert run_name(settings(), []).startswith("default-")


def test_names_have_no_home_in_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    overrides = ["corpus.paths=[/home/anna/texts/a.txt]"]
    assert run_name(settings(), overrides).startswith("paths=textsa.txt-")
    assert arm_name("default", overrides) == "paths=textsa.txt"


def test_an_arm_is_the_settings_without_seeds():
    base = settings() | {"data_seed": 0}
    same = base | {"seed": 1, "data_seed": 2, "run_dir": "x", "resume": True}
    assert arm_hash(same) == arm_hash(base) != arm_hash(base | {"model": {"num_layers": 5}})
    seeds = ["seed=1", "++data_seed=${seed}", "run_dir=x"]
    assert arm_name("default", seeds) == "default"
    assert arm_name("gu60m", ["experiment=gu60m", *seeds]) == "gu60m"
    assert arm_name("gu60m", ["optimizer.lr=1e-3", *seeds]) == "gu60m/lr=1e-3"


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="run_dir must be empty or missing"):
        open_run_folder(settings(tmp_path), "default", [])


def test_an_empty_or_missing_folder_is_taken(tmp_path):
    for path in (tmp_path, tmp_path / "new"):
        folder, resuming = open_run_folder(settings(path, resume=True), "default", [])
        assert folder.path == path and not resuming
    assert not (tmp_path / "new").exists()


def test_a_resume_may_change_its_length_only(tmp_path):
    folder = RunFolder(tmp_path)
    write_run_files(folder, settings(tmp_path), {"n": 1})
    folder.last.parent.mkdir()
    folder.last.touch()
    _, resuming = open_run_folder(settings(tmp_path, resume=True, max_steps=40), "default", [])
    assert resuming
    with pytest.raises(UserError, match=r"seed must stay 0 when a run is resumed, got 3"):
        open_run_folder(settings(tmp_path, resume=True, seed=3), "default", [])


def test_a_resume_keeps_its_kinds_and_an_old_folder_has_none(tmp_path):
    """Two kinds with the same settings are told apart; a folder from before kinds were stored
    can be resumed."""

    def of_kind(**kind):
        return settings(tmp_path, resume=True) | {"attention": {**kind, "window": None}}

    folder = RunFolder(tmp_path)
    write_run_files(folder, of_kind(), {})
    open_run_folder(of_kind(kind="softmax"), "default", [])
    write_run_files(folder, of_kind(kind="softmax"), {})
    with pytest.raises(UserError, match=r"attention\.kind must stay 'softmax'"):
        open_run_folder(of_kind(kind="off_by_one"), "default", [])


def test_provenance_keeps_every_start(tmp_path):
    folder = RunFolder(tmp_path)
    run_id = write_run_files(folder, settings(), {"n": 1})
    assert write_run_files(folder, settings(), {"n": 2}) == run_id
    written = json.loads(folder.provenance.read_text())
    assert written == {"run_id": run_id, "starts": [{"n": 1}, {"n": 2}]}
    assert yaml.safe_load(folder.config.read_text()) == settings()


def test_the_way_on_is_what_the_folder_has(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert "the same command begins again" in way_on(None) == way_on(folder)
    write_run_files(folder, settings(), {})
    assert way_on(folder).endswith("resume=true begins again")
    folder.checkpoint(0).mkdir(parents=True)
    # The first weights are what a new run begins with.
    assert start_from_weights(folder) is None and way_on(folder).endswith("begins again")
    folder.checkpoint(8).mkdir()
    (folder.last.parent / "step_00000016_mine").mkdir()
    assert newest_weights(folder) == folder.checkpoint(8)
    assert f"begins again, init_from={folder.path}@8 with a new run_dir" in way_on(folder)
    folder.last.touch()
    assert way_on(folder) == f"resume=true goes on from the last checkpoint, {folder.last}"


def test_what_lies_after_the_checkpoint_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.sinks.mkdir()
    for step in (8, 16):
        (folder.sinks / f"part-{step:08d}.parquet").touch()
        folder.checkpoint(step).mkdir(parents=True)
    (folder.last.parent / "step_00000016_mine").mkdir()
    drop_after(folder, 8)
    assert (folder.last.parent / "step_00000016_mine").exists()
    assert [p.name for p in folder.sinks.iterdir()] == ["part-00000008.parquet"]
    assert folder.checkpoint(8).exists() and not folder.checkpoint(16).exists()
