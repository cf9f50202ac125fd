"""The command that probes runs: every probe once, the same whether interrupted or not."""

import shutil

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml

from data.evaluation import ProbeKind
from kernels.errors import UserError
from scripts.probe import SHOWN, main
from tests.huggingface_models import CONFIGS, save_model
from train.going_on import drop_after
from train.mistakes import exit_code
from train.probes import PROBES
from train.probes.inputs import LONG_ROWS, TokenClass, probe_inputs, probe_set_sha256, token_classes
from train.probes.of_runs import probe_run
from train.runs import PROBE_COLUMNS, load_run


@pytest.fixture
def run(kept_run, tmp_path):
    """A copy of the kept run with three of its checkpoints."""
    folder = tmp_path / kept_run.name
    shutil.copytree(kept_run, folder)
    for step in load_run(folder).steps:
        if step not in (0, 4, 8):
            shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    return load_run(folder)


def probed(run):
    table = run.probes()
    return table.sort_values(list(PROBE_COLUMNS[:-3]), ignore_index=True)


class Killed(Exception):
    """What ends the command in the middle."""


def test_every_probe_of_every_checkpoint_once(run, capsys):
    main([str(run.path), "--rows", "4"])
    first = probed(run)
    assert list(first.columns) == list(PROBE_COLUMNS)
    assert set(first["probe"]) == set(PROBES) and set(first["step"]) == {0, 4, 8}
    assert first["value"].notna().all() and len(set(first["probe_set"])) == 1
    keys = list(PROBE_COLUMNS[:-3])
    assert not first.duplicated(keys).any()
    assert f"{3 * len(PROBES)} tables made in" in capsys.readouterr().out
    main([str(run.path), "--rows", "4"])
    assert f"nothing to do, {3 * len(PROBES)} were there" in capsys.readouterr().out
    main([str(run.path), "--rows", "3", "--last", "--probes", "losses"])
    assert "1 tables made in" in capsys.readouterr().out
    assert len(set(run.probes()["probe_set"])) == 2


def test_killed_in_the_middle_it_ends_with_the_same_table(run):
    names, device = ["losses", "sinks", "norms"], torch.device("cpu")
    made = []

    def kill(what):
        made.append(what)
        if len(made) == 5:
            raise Killed

    with pytest.raises(Killed):
        probe_run(run, names, rows=4, device=device, advance=kill)
    # A file that a kill left half-written is no table.
    half = run.folder.probes / "norms" / "step_00000008.parquet"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"PAR1")
    assert probe_run(run, names, rows=4, device=device) == 4
    interrupted = probed(run)
    shutil.rmtree(run.folder.probes)
    assert probe_run(run, names, rows=4, device=device) == 9
    pd.testing.assert_frame_equal(probed(run), interrupted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_does(run):
    tables = []
    for device in ("cpu", "cuda"):
        probe_run(run, list(PROBES), rows=4, device=torch.device(device))
        tables.append(probed(run))
        shutil.rmtree(run.folder.probes)
    of_cpu, of_gpu = tables
    pd.testing.assert_frame_equal(*(t.drop(columns="value") for t in tables))
    difference = (of_cpu["value"] - of_gpu["value"]).abs() / (1 + of_cpu["value"].abs())
    # A few counts over a threshold may flip.
    assert (difference < 2e-3).mean() > 0.99, of_gpu.assign(of_cpu=of_cpu["value"])[
        difference >= 2e-3
    ].to_string()


def test_other_weights_are_probed_anew(run):
    """What a resume trains again has the old step's name."""
    device = torch.device("cpu")
    assert probe_run(run, ["losses"], rows=4, device=device) == 3
    checkpoints = run.folder.last.parent
    shutil.rmtree(checkpoints / "step_00000004")
    shutil.copytree(checkpoints / "step_00000008", checkpoints / "step_00000004")
    again = load_run(run.path)
    assert probe_run(again, ["losses"], rows=4, device=device) == 1
    table = again.probes().set_index(["step", "name", "input"])["value"]
    assert table[4].to_list() == table[8].to_list() != table[0].to_list()
    drop_after(run.folder, 4)
    assert set(again.probes()["step"]) == {0, 4}


def test_probed_losses_are_those_of_training(run):
    """The last step's validation looked at the same prompts."""
    rows = run.settings["tracking"]["probe_rows"]
    probe_run(run, ["losses", "sinks"], rows=rows, device=torch.device("cpu"), steps=[8])
    table = run.probes().set_index(["name", "input", "layer"])["value"]
    logged = run.metrics().set_index("step").loc[8]
    for kind in ProbeKind:
        ours = table["loss", kind.value, -1].item()
        assert ours == pytest.approx(logged[f"probe/t64_{kind.value}/loss"], rel=1e-5)
        mass = table["mass", kind.value, -1].item()
        # Of a row: as the decoder has it.
        batch = probe_inputs(run.data(), rows=rows).rows[f"row_{kind.value}"]
        logits_BTV = run.at(8).model(batch).logits_BTV
        wanted = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
        assert table["loss", f"row_{kind.value}", -1].item() == pytest.approx(wanted.item())
        assert mass == pytest.approx(logged[f"probe/t64_{kind.value}/mass"], rel=1e-5)


def test_the_probe_set(run):
    data = run.data()
    inputs = probe_inputs(data, rows=5)
    assert set(inputs.prompts) == {"text", "bos_text", "eos_text", "random", "repeated"}
    assert all(batch.tokens_BT.shape == (5, 64) for batch in inputs.prompts.values())
    repeated_BT = inputs.prompts["repeated"].tokens_BT
    assert (repeated_BT == repeated_BT[:, :1]).all() and len(repeated_BT[:, 0].unique()) == 5
    assert probe_set_sha256(inputs) == probe_set_sha256(probe_inputs(data, rows=5))
    assert probe_set_sha256(inputs) != probe_set_sha256(probe_inputs(data, rows=4))
    tokenizer = data.tokenizer
    bos, eos = (inputs.prompts[name] for name in ("bos_text", "eos_text"))
    assert (bos.tokens_BT[:, 0] == tokenizer.bos_id).all()
    assert (eos.tokens_BT[:, 0] == tokenizer.eos_id).all()
    assert (bos.tokens_BT[:, 1:] == eos.tokens_BT[:, 1:]).all()
    assert (bos.labels_BT == eos.labels_BT).all()
    assert set(inputs.rows) == {"row_text", "row_bos_text", "row_eos_text"}
    context = data.packing.context
    assert all(batch.tokens_BT.shape == (5, context) for batch in inputs.rows.values())
    text, bos = inputs.rows["row_text"], inputs.rows["row_bos_text"]
    assert (text.tokens_BT[:, :-1] == bos.tokens_BT[:, 1:]).all()
    assert (text.labels_BT[:, :-1] == bos.labels_BT[:, 1:]).all()
    assert (text.labels_BT >= 0).sum() == 5 * (context - 2)
    assert len(probe_inputs(data, rows=50).rows["row_text"].tokens_BT) <= LONG_ROWS < 50
    class_V = token_classes(tokenizer)
    comma, word = (tokenizer.encode_batch([text])[0][0] for text in (",", "the"))
    assert class_V[comma] == TokenClass.delimiter and class_V[word] == TokenClass.other
    part_of_a_character = tokenizer.encode_batch(["\u732b"])[0][0]
    assert class_V[part_of_a_character] == TokenClass.other
    assert class_V[tokenizer.bos_id] == TokenClass.bos
    assert class_V[tokenizer.eos_id] == TokenClass.eos


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere must be a run folder"),
        (["{run}", "hf=x"], "RUN must be runs or one hf=FOLDER"),
        (["{run}", "--probes", "sinks,smells"], "--probes must be among sinks, losses"),
        (["{run}", "--rows", "0"], "--rows must be >= 1, got 0"),
        (["{run}", "--out", "x.csv"], "--out must be left out for runs"),
        (["hf=nowhere", "--out", "x.txt"], "--out must end in .parquet or .csv"),
        (["hf=nowhere"], "hf must be a folder with config.json"),
        (["hf=nowhere", "--last"], "--last must be left out for hf=FOLDER"),
        (["hf=nowhere", "--probes", "sinks"], "--probes must be left out for hf=FOLDER"),
        (["hf=one", "hf=two"], "hf must be one folder at a time, got 2"),
        (["{run}", "--device", "tpu"], "--device must be one of auto, cpu, cuda"),
    ],
)
def test_mistakes(run, arguments, message):
    with pytest.raises(UserError) as caught:
        main([argument.format(run=run.path) for argument in arguments])
    assert message in str(caught.value)


def test_a_run_that_cannot_be_probed_does_not_end_the_others(run, train, tmp_path, capsys):
    """Not its rows too short, its text gone, nor its folder no run's."""
    short = tmp_path / "short"
    assert train("packing.context=32", "trainer.max_steps=1", run_dir=short) == 0
    lost = tmp_path / "lost"
    shutil.copytree(run.path, lost)
    settings = yaml.safe_load((lost / "config.yaml").read_text())
    settings["corpus"] = {"kind": "files", "paths": [str(tmp_path / "gone.txt")]}
    (lost / "config.yaml").write_text(yaml.safe_dump(settings))
    bad = [short, lost, tmp_path / "nowhere"]
    arguments = [*map(str, bad), str(run.path), "--rows", "3", "--last", "--probes", "losses"]
    capsys.readouterr()
    assert exit_code(main, arguments) == 2
    out, err = capsys.readouterr()
    assert f"{run.path}: 1 tables made in" in out and set(run.probes()["step"]) == {8}
    lines = err.splitlines()
    assert len(lines) == 4, err
    for line, path in zip(lines, bad, strict=False):
        assert line.startswith(f"error: {path}") and line.count(str(path)) == 1
    assert "packing.context must be >= 64 to be probed, got 32" in lines[0]
    assert "gone.txt" in lines[1] and "must be a run folder" in lines[2]
    assert lines[3] == "error: RUN must be runs that can be probed, 3 of 4 can't"
    assert exit_code(main, [str(short)]) == 2
    assert capsys.readouterr().err == "error: packing.context must be >= 64 to be probed, got 32\n"


def test_a_hugging_face_model(run, tmp_path, capsys):
    run.to_hf("last", tmp_path / "exported")
    out = tmp_path / "sinks.csv"
    main([f"hf={tmp_path / 'exported'}", "--rows", "3", "--out", str(out)])
    table = pd.read_csv(out)
    assert {"text", "bos_text", "random", "repeated"} == set(table["input"])
    shown = capsys.readouterr().out
    mass = table.query("name == 'mass' and layer == -1 and input == 'text'")["value"].item()
    assert f"{mass:.4f}".rstrip("0") in shown
    assert set(table["model"]) == {"exported"} and set(table["probe"]) == {"sinks", "norms"}
    assert len(set(table["probe_set"])) == 1
    lines = shown.splitlines()
    # The header, then a line an input with its number of prompts.
    assert lines[1].split() == ["prompts", *SHOWN]
    counts = {line.split()[0]: line.split()[1] for line in lines[3:7]}
    assert counts == dict.fromkeys(("bos_text", "random", "repeated", "text"), "3")


def test_a_hugging_face_model_whose_windows_hide_the_first_key(tmp_path, capsys):
    folder = save_model(tmp_path / "mistral", CONFIGS["mistral"])
    out = tmp_path / "sinks.parquet"
    assert exit_code(main, [f"hf={folder}", "--rows", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    expected = f"no figure of the first key in {folder}: no layer lets 64 queries see it"
    assert shown.splitlines() == [expected, f"every layer and head: {out}"]
    table = pd.read_parquet(out)
    assert set(table.query("name == 'mass'")["position"]) == set(range(1, 8))


def test_probes_at_validations_are_metrics(train, tmp_path):
    assert train("tracking.probes=[losses,norms]", "trainer.max_steps=1") == 0
    trained = load_run(tmp_path / "run")
    rows = trained.settings["tracking"]["probe_rows"]
    probe_run(trained, ["losses", "norms"], rows=rows, device=torch.device("cpu"), steps=[1])
    logged = trained.metrics().set_index("step").loc[1]
    table = trained.probes()
    cost = table.query("name == 'cost_hidden_first' and input == 'text'")["value"].item()
    assert logged["probe/losses/text/cost_hidden_first"] == pytest.approx(cost, abs=1e-5)
    ratio = table.query("name == 'value_ratio' and input == 'bos_text' and layer == 1")["value"]
    assert logged["probe/norms/bos_text/value_ratio/layer_01"] == pytest.approx(ratio.mean())


def test_probes_at_validations_that_cannot_be(train, tmp_path, capsys):
    assert train("tracking.probes=[smells]") == 2
    assert "tracking.probes must be among sinks, losses" in capsys.readouterr().err
    assert train("tracking.probes=[losses]", "packing.context=32") == 2
    assert "tracking.probes must be [] for packing.context < 64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
