"""Runs read back: tables, checkpoints, attention, exports; also unfinished and old folders."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from data.packing import BosKind, MaskKind
from kernels.errors import UserError
from models.attention import ATTENTIONS
from models.batch import PackedBatch
from models.checkpoints import load_model, save_model
from models.decoder import Decoder
from train.config import RunConfig, compose, plain, restored
from train.kinds import GROUPS
from train.run_folder import RunFolder, arm_hash, experiment_hash, write_run_files
from train.runs import PROBE_COLUMNS, SINK_COLUMNS, arm_label, differences, load_run

TEXT = "It was a truth"


@pytest.fixture
def run(kept_run):
    return load_run(kept_run)


@pytest.fixture
def copied(kept_run, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(kept_run, tmp_path / "copy"))


def test_a_run_says_what_it_is(run, kept_run):
    assert (run.path, run.name, run.experiment) == (kept_run, "seed=3-0a1b2c3d", "default")
    assert run.settings == yaml.safe_load((kept_run / "config.yaml").read_text())
    assert run.seeds == (3, 0) and run.tokens_per_step == 1024
    assert run.provenance["seed"] == 3 and run.provenance["arm"] == run.arm_hash
    assert run.steps == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_its_tables_are_its_files(run, kept_run):
    table = run.metrics()
    assert table.columns[:2].tolist() == ["step", "tokens"]
    assert table["tokens"].tolist() == [1024 * step for step in range(9)]
    assert table["val/canonical_loss"].notna().tolist() == [i % 4 == 0 for i in range(9)]
    parts = pd.read_parquet(kept_run / "sinks")
    assert tuple(run.sinks().columns) == SINK_COLUMNS
    pd.testing.assert_frame_equal(run.sinks(), parts)
    assert tuple(run.probes().columns) == PROBE_COLUMNS and run.probes().empty


def test_probes_are_read_from_every_folder(copied):
    rows = [dict.fromkeys(PROBE_COLUMNS, i) for i in range(3)]
    for place, row in zip(("a/part.parquet", "a/b/part.parquet", "c.parquet"), rows, strict=True):
        path = copied / "probes" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_parquet(path)
    assert sorted(load_run(copied).probes()["value"]) == [0, 1, 2]


def test_a_run_that_is_still_training_can_be_read(copied):
    """A line half written, a checkpoint half written, no sinks yet; then not even metrics."""
    with (copied / "metrics.csv").open("a") as file:
        file.write("9,92")
    (copied / "checkpoints" / ".step_00000009.x1").mkdir()
    shutil.rmtree(copied / "sinks")
    run = load_run(copied)
    assert run.metrics()["step"].tolist() == list(range(9)) and run.steps[-1] == 8
    assert run.sinks().empty and tuple(run.sinks().columns) == SINK_COLUMNS
    (copied / "metrics.csv").unlink()
    shutil.rmtree(copied / "checkpoints")
    assert run.metrics().columns.tolist() == ["step", "tokens"] and run.steps == []
    with pytest.raises(UserError, match=r"kept \(none so far\)"):
        run.at("last")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "there is no such folder"),
        (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
        (lambda run: (run / "provenance.json").unlink(), "it has no provenance.json"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml must be YAML"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), "must hold the settings of a run"),
        (lambda run: (run / "config.yaml").write_text("!!python/name:os.system"), "must be YAML"),
        (lambda run: (run / "provenance.json").write_text("{}"), "must hold a run_id"),
    ],
)
def test_what_is_no_run_folder_is_named(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message) as error:
        load_run(copied)
    assert str(copied) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_table_is_named(copied):
    (copied / "sinks" / "part-00000008.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00000008.parquet must be an intact table"):
        load_run(copied).sinks()


def test_a_checkpoint_is_the_model_that_was_kept(run, kept_run):
    kept = run.at(4)
    assert (kept.step, kept.tokens, kept.model.training) == (4, 4096, False)
    weights = load_model(kept_run / "checkpoints" / "step_00000004").state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in kept.model.state_dict().items())
    assert run.at(4) is kept and run.at("last").step == 8
    assert kept.tokenizer.decode(kept.tokenizer.encode_batch([TEXT])[0]) == TEXT


def test_a_step_that_was_not_kept_is_refused(run):
    with pytest.raises(UserError, match=r"kept \(0, 1, 2, 3, 4, 5, 6, 7, 8\) or last, got 9"):
        run.at(9)


def test_another_tokenizer_in_the_folder_is_refused(copied):
    path = copied / "tokenizer.json"
    path.write_text(path.read_text().replace("<pad>", "<qad>"))
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    settings["tokenizer"]["pad"] = "<qad>"
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"tokenizer.json must have SHA-256"):
        _ = load_run(copied).at("last").tokenizer


def test_its_data_are_set_up_again(run, kept_run, cache_dir):
    data = run.data()
    assert run.data() is data and run.data(cache_dir) is data
    table = run.metrics()
    loss = 0.0
    for batch in data.canonical_batches():
        logits_BTV = run.at(8).model(batch, statistics="off").logits_BTV
        loss += torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
        ).item() / int(batch.num_labels)
    assert loss == pytest.approx(table["val/canonical_loss"].iloc[-1], rel=1e-5)
    other = load_run(kept_run)
    other.provenance["data"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="must be those it trained on"):
        other.data()


def test_attention_by_the_tokens_text(run):
    matrix = run.attention(TEXT, layer=1, head=0)
    assert matrix.index.tolist() == matrix.columns.tolist()
    assert matrix.index[0] == "<bos>" and "".join(matrix.index[1:]) == TEXT
    values_TS = torch.from_numpy(matrix.to_numpy(copy=True))
    tokenizer = run.at(8).tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode_batch([TEXT])[0]]
    record = run.at(8).model(PackedBatch.of_prompts(torch.tensor([ids]))).layers[1]
    torch.testing.assert_close(values_TS[:, 0], record.statistics.first_mass_BHT[0, 0])
    torch.testing.assert_close(values_TS.sum(0), record.statistics.key_mass_BHS[0, 0])
    assert values_TS.triu(1).eq(0).all()
    without = run.attention(TEXT, layer=1, head=0, step=0, bos=False)
    assert without.index.tolist() == matrix.index.tolist()[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, r"layer must be in 0, ..., 1, got 2"),
        ({"head": -1}, r"head must be in 0, ..., 1, got -1"),
        ({"text": "", "bos": False}, "text must have at least one token"),
        ({"step": 99}, "step must be one"),
    ],
)
def test_attention_that_isnt_there(run, changes, message):
    with pytest.raises(UserError, match=message):
        run.attention(**{"text": TEXT, "layer": 0, "head": 0} | changes)


def test_an_export_has_the_runs_tokenizer_and_logits(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run.to_hf("last", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = run.at(8).tokenizer
    assert tokenizer(TEXT)["input_ids"] == ours.encode_batch([TEXT])[0]
    ids = tokenizer(tokenizer.bos_token + TEXT, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == ours.bos_id and tokenizer.eos_token_id == ours.eos_id
    assert tokenizer.pad_token_id == ours.pad_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.bos_token_id == ours.bos_id
    with torch.no_grad():
        logits_BTV = run.at(8).model(PackedBatch.of_prompts(ids)).logits_BTV
        torch.testing.assert_close(model(ids).logits, logits_BTV, rtol=0, atol=1e-4)


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
