"""Runs read back: tables, checkpoints, attention, exports; also unfinished and old folders."""

import shutil

import pandas as pd
import pytest
import torch
import yaml

from kernels.errors import UserError
from models.batch import PackedBatch
from models.checkpoints import load_model
from train.runs import PROBE_COLUMNS, SINK_COLUMNS, load_run

TEXT = "It was a truth"


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
