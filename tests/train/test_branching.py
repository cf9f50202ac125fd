"""Runs that start from another's weights: the same losses, the parent written down, what fits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from kernels.errors import UserError
from train.arms import arm_label
from train.branching import split_init_from
from train.config import compose
from train.run_folder import arm_hash, experiment_hash, run_name
from train.runs import Run, load_run

# Its runs are made once, by one worker.
pytestmark = pytest.mark.xdist_group("branching")

VALIDATIONS = ["val/own_loss", "val/canonical_loss", "probe/t64_text/mass", "probe/t64_text/loss"]


def row(run: Run, step: int):
    return run.metrics().set_index("step").loc[step]


@pytest.fixture
def parent(kept_run) -> Run:
    return load_run(kept_run)


@pytest.fixture(scope="module")
def branch(kept_run, cache_dir, tmp_path_factory) -> Run:
    """A branch at step 4 with another BOS, another seed and another order of the data."""
    from train.__main__ import command

    folder = tmp_path_factory.mktemp("branch") / "run"
    where = (f"cache_dir={cache_dir}", f"run_dir={folder}", f"init_from={kept_run}@4")
    changed = ("packing=document", "seed=9", "data_seed=5", "trainer.max_steps=2")
    assert command(["debug=cpu", *where, *changed]) == 0
    return load_run(folder)


def test_a_branch_begins_with_its_parents_losses(train, parent, tmp_path):
    """Nothing else changed: all that was validated is equal, to the bit."""
    assert train(f"init_from={parent.path}@4", "trainer.max_steps=1") == 0
    branch = load_run(tmp_path / "run")
    for name in VALIDATIONS:
        assert row(branch, 0)[name] == row(parent, 4)[name], name
    assert row(branch, 0)["val/own_loss"] < row(parent, 0)["val/own_loss"]


def test_a_branchs_first_step_is_the_parents_weights_on_its_own_rows(branch, parent):
    data = branch.data()
    assert data.packing.bos == "none"
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        loss = parent.at(4).model.loss(batch, statistics="off").loss / batch.num_labels
    assert row(branch, 1)["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    ours, theirs = (run.at(step).model.state_dict() for run, step in ((branch, 0), (parent, 4)))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_branch_says_whose_weights_it_had(branch, parent):
    written = branch.provenance["parent"]
    assert written == branch.settings["parent"]
    assert written == {
        "path": str(parent.path.resolve()),
        "run_id": json.loads((parent.path / "provenance.json").read_text())["run_id"],
        "arm": parent.arm_hash,
        "step": 4,
        "weights_sha256": parent.at(4).weights_sha256,
    }
    assert parent.provenance["parent"] is None
    started = f"init_from={parent.arm_hash}@4"
    assert started in arm_label([parent, branch])[branch.path]
    assert "init_from" not in arm_label([parent, branch])[parent.path]
    assert branch.config.init_from == f"{parent.path}@4"


def test_a_branch_goes_on_from_its_own_checkpoint(train, branch, parent, kept_run, tmp_path):
    """To the bit, and without its parent."""
    moved, resumed, straight = (tmp_path / name for name in ("parent", "resumed", "straight"))
    shutil.copytree(kept_run, moved)
    same = ("packing=document", "tracking.last_every=2", f"init_from={moved}@last")
    assert train(*same, run_dir=straight) == 0
    assert train(*same, "trainer.max_steps=2", run_dir=resumed) == 0
    shutil.rmtree(moved)
    assert train(*same, "resume=true", run_dir=resumed) == 0
    one, other = (load_run(path) for path in (straight, resumed))
    weights = other.at(4).model.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in one.at(4).model.state_dict().items())
    assert one.provenance["parent"] == other.provenance["parent"]
    assert one.provenance["parent"]["step"] == 8


def test_a_resume_keeps_its_parent(train, branch, parent, tmp_path, capsys):
    copied = Path(shutil.copytree(branch.path, tmp_path / "copy"))
    same = ("packing=document", "seed=9", "data_seed=5", "resume=true")
    assert train(*same, f"init_from={parent.path}@3", run_dir=copied) == 2
    error = capsys.readouterr().err
    assert f"init_from must stay '{parent.path}@4' when a run is resumed" in error


WRONG = {
    "no step": ("init_from={parent}", "init_from must be RUN@STEP"),
    "no run": ("init_from={parent}-none@4", "-none must be a run folder"),
    "step not kept": ("init_from={parent}@77", "or last, got 77"),
    "depth": ("model.num_layers=3", "model.num_layers must be 2 as in init_from="),
    "heads of equal tensors": ("model.num_heads=4", "model.num_heads must be 2 as in init_from="),
    "width inside": (
        "model.d_ff=64",
        "blocks.0.feed_forward.gate.weight is (128, 128) there, (64,",
    ),
    "missing weight": ("attention=sink_logit", "blocks.0.attention.logit_H is absent there"),
}


@pytest.mark.parametrize(("override", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_one_line(train, parent, tmp_path, capsys, override, message):
    override = override.format(parent=parent.path)
    overrides = [override] if "init_from" in override else [override, f"init_from={parent.path}@4"]
    assert train(*overrides) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and message in printed[0], printed
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_does_not_fit(train, parent, tmp_path, capsys):
    """Of equal size, so that every weight fits: its tokens would mean others."""
    other = Path(shutil.copytree(parent.path, tmp_path / "other"))
    written = json.loads((other / "provenance.json").read_text())
    written["starts"][-1]["data"]["tokenizer_sha256"] = "0" * 64
    (other / "provenance.json").write_text(json.dumps(written))
    assert train(f"init_from={other}@4") == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and "must have this run's tokenizer" in printed[0]
    assert not (tmp_path / "run").exists()


def test_a_parent_that_changed_is_refused(train, parent, branch, tmp_path, capsys):
    """Between a start that left no checkpoint and the next."""
    run, moved = tmp_path / "run", tmp_path / "parent"
    shutil.copytree(parent.path, moved)
    same = (f"init_from={moved}@4", "trainer.max_steps=1")
    assert train(*same) == 0
    (run / "checkpoints" / "last.ckpt").unlink()
    for name in ("model.safetensors", "model.json"):
        kept = [moved / "checkpoints" / f"step_0000000{step}" / name for step in (5, 4)]
        shutil.copyfile(*kept)
    capsys.readouterr()
    assert train(*same, "resume=true") == 2
    assert "must hold the weights that the run started from" in capsys.readouterr().err


def test_hashes_take_the_weights_not_their_place(branch):
    settings = branch.settings
    elsewhere = settings | {"init_from": "x@4", "parent": settings["parent"] | {"path": "/x"}}
    assert experiment_hash(elsewhere) == experiment_hash(settings)
    others = settings | {"parent": settings["parent"] | {"weights_sha256": "0" * 64}}
    assert experiment_hash(others) != experiment_hash(settings)
    # Another seed's weights of the same arm and step make the same arm.
    assert arm_hash(others) == arm_hash(settings)
    later = settings | {"parent": settings["parent"] | {"step": 5}}
    assert arm_hash(later) != arm_hash(settings)
    unbranched = {k: v for k, v in settings.items() if k != "parent"} | {"init_from": None}
    assert arm_hash(unbranched) != arm_hash(settings)


def test_the_name_tells_the_parents_hash_and_step(branch):
    overrides = ["init_from='runs/default/seed=1-0a1b2c3d@128'", "packing=causal"]
    assert run_name(branch.settings, overrides).startswith("init_from=0a1b2c3d.128_packing=causal-")


@pytest.mark.parametrize(
    ("told", "run", "step"),
    [("a/b=c-1@12", "a/b=c-1", 12), ("a@b@last", "a@b", "last"), ("x@0", "x", 0)],
)
def test_init_from_is_a_run_and_a_step(told, run, step):
    assert split_init_from(told) == (Path(run), step)


@pytest.mark.parametrize("told", ["run", "run@", "@4", "run@-1", "run@first", "run@²"])
def test_anything_else_is_not(told):
    with pytest.raises(UserError, match="init_from must be RUN@STEP"):
        split_init_from(told)


def test_a_new_run_without_a_parent_stores_none(parent):
    stored = yaml.safe_load((parent.path / "config.yaml").read_text())
    assert stored["init_from"] is None and "parent" not in stored
    assert compose([])[0].init_from is None
