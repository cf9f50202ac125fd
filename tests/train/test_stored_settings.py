"""Settings as run folders store them: read back typed, hashed, compared; old folders too."""

import shutil
from dataclasses import asdict, replace

import pytest
import yaml
from omegaconf import OmegaConf

from data.packing import BosKind, MaskKind
from kernels.errors import UserError
from models.attention import ATTENTIONS
from models.checkpoints import save_model
from models.decoder import Decoder
from train.config import RunConfig, compose, plain, restored
from train.kinds import GROUPS
from train.run_folder import RunFolder, arm_hash, experiment_hash, write_run_files
from train.runs import arm_label, differences, load_run


@pytest.fixture(scope="module")
def default() -> RunConfig:
    return compose([])[0]


def settings_of(config: RunConfig, **sections) -> dict:
    """What a run with other sections stores: composing each would take half a second."""
    return plain(OmegaConf.structured(replace(config, **sections)))


CHOICES = [(group, kind) for group, kinds in GROUPS.items() for kind in kinds]
NEEDS = {"files": {"paths": ["x"]}, "hub": {"name": "a/b"}, "file": {"path": "x"}}


@pytest.mark.parametrize(("group", "kind"), CHOICES)
def test_stored_settings_give_the_run_back(default, group, kind):
    section = GROUPS[group][kind](**NEEDS.get(kind, {}))
    config = replace(default, **{group: section, "seed": 7})
    stored = yaml.safe_load(yaml.safe_dump(settings_of(config)))
    assert stored[group]["kind"] == kind
    assert asdict(restored(stored)) == asdict(config)
    assert type(getattr(restored(stored), group)) is type(section)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("attention", {"kind": "hard"}, "attention.kind must be one of"),
        ("optimizer", {"lr": "fast"}, "optimizer.lr"),
        ("schedule", {"speed": 1}, "schedule.speed"),
    ],
)
def test_stored_settings_that_dont_exist_here_are_named(default, group, change, message):
    settings = settings_of(default)
    settings[group] |= change
    with pytest.raises(UserError, match=message) as error:
        restored(settings)
    assert "\n" not in str(error.value)


def test_hashes_tell_kinds_apart_and_arms_ignore_seeds(default):
    kinds = {name: kind() for name, kind in GROUPS["attention"].items()}
    by_kind = {name: settings_of(default, attention=kind) for name, kind in kinds.items()}
    assert len({experiment_hash(settings) for settings in by_kind.values()}) == len(kinds)
    assert len({arm_hash(settings) for settings in by_kind.values()}) == len(kinds)
    seeded = settings_of(default, attention=kinds["gated"], seed=4, data_seed=5)
    assert arm_hash(seeded) == arm_hash(by_kind["gated"])
    assert experiment_hash(seeded) != experiment_hash(by_kind["gated"])


def without_kinds(settings: dict) -> dict:
    """Settings as they were stored before kinds and init_from were."""
    old = {
        name: {k: v for k, v in value.items() if k != "kind"} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    del old["init_from"]
    return old


def test_the_hash_of_a_default_run_is_what_it_was_without_kinds(default):
    settings = settings_of(default)
    assert without_kinds(settings)["attention"] != settings["attention"]
    assert experiment_hash(settings) == experiment_hash(without_kinds(settings))
    assert arm_hash(settings) == arm_hash(without_kinds(settings))


def test_a_folder_without_kinds_and_tokenizer_is_read(copied, run):
    """As runs left it before both were stored: a checkpoint tells softmax from off_by_one."""
    settings = without_kinds(run.settings)
    del settings["tracking"]["figures"]
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    (copied / "tokenizer.json").unlink()
    old = load_run(copied)
    for group in GROUPS:
        assert old.settings[group] == run.settings[group]
    assert old.config.tracking.figures
    assert old.at(0).tokenizer.sha256 == run.at(0).tokenizer.sha256

    first = run.at(0).model
    other = Decoder(first.config, ATTENTIONS["off_by_one"].Config(), first.vocab_size)
    shutil.rmtree(copied / "checkpoints" / "step_00000000")
    save_model(other, copied / "checkpoints" / "step_00000000")
    assert load_run(copied).settings["attention"]["kind"] == "off_by_one"


@pytest.fixture
def stored(tmp_path):
    """``stored("seed=1", ...)``: the folder of a run that has only just begun, read back."""

    def make(config: RunConfig, name: str):
        folder = RunFolder(tmp_path / name)
        write_run_files(folder, settings_of(config), {"experiment": "norms"})
        return load_run(folder.path)

    return make


def test_runs_differ_in_their_settings(stored, default):
    gated = GROUPS["attention"]["gated"](window=64)
    no_bos = replace(default.tokenizer, bos=None)
    packing = replace(default.packing, bos=BosKind.none, mask=MaskKind.document)
    runs = [
        stored(default, "a"),
        stored(replace(default, seed=1, cache_dir="elsewhere"), "b"),
        stored(replace(default, attention=gated), "c"),
        stored(replace(default, packing=packing, tokenizer=no_bos), "d"),
    ]
    table = differences(runs)
    assert table.index.tolist() == [str(run.path) for run in runs]
    assert table["seed"].tolist() == [0, 1, 0, 0]
    assert table["data_seed"].tolist() == [0, 0, 0, 0]
    # gate and place are gated's alone, so they say nothing that its name doesn't.
    assert set(table.columns) == {
        *("tokenizer.bos", "packing.mask", "packing.bos"),
        *("attention", "attention.window", "seed", "data_seed"),
    }
    assert table["attention"].tolist() == ["softmax", "softmax", "gated", "softmax"]
    labels = arm_label(runs)
    rest = "packing.mask=causal, packing.bos=pinned, attention=softmax, attention.window=null"
    assert labels[runs[0].path] == labels[runs[1].path] == f"tokenizer.bos=<bos>, {rest}"
    assert "attention=gated, attention.window=64" in labels[runs[2].path]
    assert "tokenizer.bos=null, packing.mask=document, packing.bos=none" in labels[runs[3].path]
    assert len(set(labels.values())) == 3


def test_runs_of_one_arm_are_called_by_their_experiment(stored, default):
    runs = [stored(default, "a"), stored(replace(default, seed=1), "b")]
    assert differences(runs).columns.tolist() == ["seed", "data_seed"]
    assert set(arm_label(runs).values()) == {"norms"}
