"""Every wrong input ends in one line that names the setting, the rule and the value, with exit
code 2, and leaves nothing half-written behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import KEPT_RUN

WRONG_SETTINGS = {
    "unknown section": (
        ["modle.num_layers=3"],
        "error: there is no setting modle; did you mean model?",
    ),
    "unknown key": (
        ["model.num_layer=3"],
        "error: there is no setting model.num_layer; did you mean model.num_layers?",
    ),
    "unknown key like no other": (
        ["packing.xyz=64"],
        "error: there is no setting packing.xyz",
    ),
    "unknown key of Hydra's": (
        ["hydra/launcher=machine", "hydra.launcher.n_job=2"],
        "error: there is no setting hydra.launcher.n_job; did you mean hydra.launcher.n_jobs?",
    ),
    "unknown group": (
        ["experimnt=gu60m"],
        "error: there is no setting experimnt; did you mean experiment?",
    ),
    "added key": (
        ["+packing.contxt=64"],
        "there is no setting packing.contxt; did you mean packing.context?",
    ),
    "added section": (["+trackng.every=1"], "there is no setting trackng; did you mean tracking?"),
    "unknown choice": (
        ["attention=sofmax"],
        "v_bias, got 'sofmax'; did you mean softmax?",
    ),
    "mistyped experiment": (
        ["experiment=gu60"],
        "softpick, got 'gu60'; did you mean gu60m?",
    ),
    "unknown experiment": (
        ["experiment=nothing"],
        "error: experiment must be one of barbero120m, ",
    ),
    "wrong type": (
        ["optimizer.lr=fast"],
        "error: optimizer.lr=fast: Value 'fast' of type 'str' could not be converted to Float",
    ),
    "wrong enum": (["packing.bos=everywhere"], "packing.bos"),
    "unparsable override": (
        ["packing.context=[1"],
        "override 'packing.context=[1' can't be parsed",
    ),
    "negative context": (["packing.context=-1"], "packing.context must be >= 2, got -1"),
    "batch not whole rows": (
        ["packing.batch_tokens=1000"],
        "packing.batch_tokens must be a multiple of packing.context = 128, got 1000",
    ),
    "batch not whole micro-batches": (
        ["packing.micro_batch_rows=3"],
        "packing.batch_tokens must be a multiple of context 128 x micro-batch rows 3",
    ),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps must be >= 1, got 0"),
    "negative rate": (["optimizer.lr=-1"], "optimizer.lr must be > 0, got -1"),
    "negative decay": (["optimizer.weight_decay=-1"], "optimizer.weight_decay must be >= 0"),
    "clip of zero": (["optimizer.clip=0"], "optimizer.clip must be > 0 or null"),
    "momentum of one": (["optimizer=sgd", "optimizer.momentum=1"], "optimizer.momentum must be in"),
    "negative warm-up": (["schedule.warmup_steps=-1"], "schedule.warmup_steps must be >= 0"),
    "schedule shorter than the run": (
        ["schedule=cosine", "schedule.total_steps=2"],
        "schedule.total_steps must be >= trainer.max_steps (4), got 2",
    ),
    "heads that don't divide the width": (
        ["model.num_heads=3"],
        "model.d_model must be a multiple",
    ),
    "key heads that don't divide": (
        ["model.num_heads=4", "model.num_kv_heads=3"],
        "model.num_kv_heads must divide model.num_heads = 4, got 3",
    ),
    "no layers": (["model.num_layers=0"], "model.num_layers must be >= 1, got 0"),
    "odd head dim under rope": (["model.head_dim=7"], "model.head_dim"),
    "more positions than learned": (
        ["model.position=learned", "model.max_positions=100"],
        "model.max_positions must be >= 128 for packing.context = 128, got 100",
    ),
    "slopes for a window of no layer": (
        ["attention.global_every=2"],
        "attention.global_every must be >= 1 beside a window, or null, got 2",
    ),
    "unknown norm": (["model.norm=batch"], "model.norm must be one of"),
    "unknown implementation": (
        ["attention.implementation=fast"],
        "attention.implementation must be one of",
    ),
    "window of zero": (["attention.window=0"], "attention.window must be >= 1 or null, got 0"),
    "a GPU that isn't there": (["trainer.accelerator=gpu"], "trainer.accelerator must be cpu"),
    "vocabulary too large for the dtype": (
        ["tokenizer.vocab_size=70000", "corpus.store_dtype=uint16"],
        "corpus.store_dtype",
    ),
    "vocabulary too small": (["tokenizer.vocab_size=10"], "tokenizer.vocab_size"),
    "pinned BOS without a BOS token": (["tokenizer.bos=null"], "packing.bos"),
    "EOS without an EOS token": (["tokenizer.eos=null"], "packing.eos"),
    "nothing held out": (["corpus.validation_fraction=0"], "corpus.validation_fraction must be"),
    "missing corpus file": (
        ["corpus=files", "corpus.paths=[{tmp}/none.jsonl]"],
        "corpus.paths",
    ),
    "empty corpus file": (["corpus=files", "corpus.paths=[{tmp}/empty.txt]"], "corpus"),
    "missing text field": (
        ["corpus=files", "corpus.paths=[{tmp}/other.jsonl]"],
        "corpus.text_field",
    ),
    "damaged corpus file": (["corpus=files", "corpus.paths=[{tmp}/torn.jsonl]"], "corpus.paths"),
    "missing tokenizer file": (
        ["tokenizer=file", "tokenizer.path={tmp}/none.json"],
        "tokenizer.path",
    ),
    "damaged tokenizer file": (
        ["tokenizer=file", "tokenizer.path={tmp}/torn.jsonl"],
        "tokenizer.path",
    ),
    "hub that can't be reached": (["corpus=hub", "corpus.name=nobody/nothing"], "corpus.name"),
    "empty cache_dir": (["cache_dir="], "cache_dir must be the path of a folder, got ''"),
    "negative seed": (["seed=-1"], "seed must be in [0, 2**31), got -1"),
    "no log steps": (["tracking.log_every=0"], "tracking.log_every must be >= 1, got 0"),
    "unknown statistics": (["tracking.statistics=all"], "tracking.statistics"),
}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """What the overrides' placeholders stand for."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "x"}\n{"tex')
    return {"tmp": tmp_path}


def assert_one_line(capsys, expected: str) -> None:
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ") and expected in lines[0], lines[0]
    assert "full_key" not in lines[0] and "Could not override" not in lines[0]


@pytest.mark.parametrize(("overrides", "expected"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_a_wrong_setting_ends_in_one_line(train, files, tmp_path, capsys, overrides, expected):
    overrides = [override.format(**files) for override in overrides]
    assert train(*overrides) == 2
    assert_one_line(capsys, expected)
    assert not (tmp_path / "run").exists()


HEAVY = ("lightning", "wandb", "transformers", "pandas", "matplotlib", "datasets")

FRESH = f"""
import sys
from train.__main__ import command
assert command(["packing.context=-1"]) == 2
sys.exit(" ".join({set(HEAVY)} & sys.modules.keys()) or None)
"""


def test_a_mistake_is_told_without_what_only_a_run_needs():
    """Such imports made --help and every typo take 7 seconds."""
    root = Path(__file__).parents[2]
    fresh = subprocess.run([sys.executable, "-c", FRESH], cwd=root, capture_output=True, text=True)
    told = "error: packing.context must be >= 2, got -1\n"
    assert (fresh.returncode, fresh.stderr) == (0, told)


def test_a_pinned_bos_that_is_the_eos(train, kept_run, tmp_path, capsys):
    tokenizer = shutil.copy(kept_run / "tokenizer.json", tmp_path / "bpe.json")
    assert train("tokenizer=file", f"tokenizer.path={tokenizer}", "tokenizer.bos='<eos>'") == 2
    assert_one_line(capsys, "packing.bos")


def test_a_folder_in_use_is_left_alone(train, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert train() == 2
    assert_one_line(
        capsys, f"run_dir must be empty or missing (resume=true goes on in it), got {run}"
    )
    assert train("resume=true") == 2
    assert_one_line(capsys, "run_dir must be a run folder to resume")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_run_dir_that_is_a_file(train, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert train() == 2
    assert_one_line(capsys, "run_dir must be a folder")


def test_run_dir_that_is_empty(train, capsys):
    assert train("run_dir=", run_dir=None) == 2
    assert_one_line(capsys, "run_dir must be the path of a folder, got ''")


def test_resuming_with_other_settings(train, copied, capsys):
    before = (copied / "config.yaml").read_bytes()
    assert train(*KEPT_RUN, "resume=true", "model.num_layers=3", run_dir=copied) == 2
    assert_one_line(capsys, "model.num_layers must stay 2 when a run is resumed, got 3")
    assert (copied / "config.yaml").read_bytes() == before


def test_resuming_a_finished_run(train, copied, capsys):
    assert train(*KEPT_RUN, "resume=true", run_dir=copied) == 2
    assert_one_line(capsys, "trainer.max_steps must be > 8 to go on with the run")


def test_a_damaged_store_is_refused_by_name(train, kept_run, cache_dir, tmp_path, capsys):
    cache = Path(shutil.copytree(cache_dir, tmp_path / "cache"))
    for tokens in cache.rglob("train.bin"):
        content = bytearray(tokens.read_bytes())
        content[1000] ^= 1
        tokens.chmod(0o644)
        tokens.write_bytes(content)
    assert train(f"cache_dir={cache}") == 2
    assert_one_line(capsys, "train.bin")
    assert not (tmp_path / "run").exists()
