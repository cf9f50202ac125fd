"""``python -m scripts.prepare`` and its benchmark, as commands."""

import json

import pytest

from data.store import read_store
from scripts import bench_prepare, prepare


@pytest.fixture
def settings(corpus_file, tmp_path) -> list[str]:
    return [
        "corpus=files",
        f"corpus.paths=[{corpus_file}]",
        "corpus.validation_fraction=0.2",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
        f"cache_dir={tmp_path}",
    ]


def test_it_makes_what_training_looks_for(settings, tmp_path, capsys, monkeypatch):
    assert prepare.command(["--processes", "1", *settings]) == 0
    told = capsys.readouterr().out
    (path,) = (path for path in (tmp_path / "stores").iterdir() if path.is_dir())
    assert "in rows of 256 tokens:" in told and "best_fit documents cut " in told
    assert f"token store {path}" in told and f"data sha256 {read_store(path).sha256}" in told

    def build(*_, **__):
        raise AssertionError("built again")

    monkeypatch.setattr("data.store.build_store", build)
    from train.__main__ import command

    limits = ["debug=cpu", "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    assert command([*limits, *settings]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.paths=[/no/such/file]", "corpus.paths must match at least one file"),
        ("corpus.no_such=1", "there is no setting corpus.no_such"),
        ("--processes=0", "--processes must be >= 1, got 0"),
    ],
)
def test_mistakes_are_one_line(settings, capsys, override, message):
    assert prepare.command([*settings, override]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1


def test_an_interruption_says_how_to_go_on(settings, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "open_corpus", interrupt)
    assert prepare.command(settings) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_benchmark_tells_both_speeds(settings, capsys, tmp_path):
    bench_prepare.main(["--json", str(tmp_path / "figures.json"), *settings])
    figures = json.loads((tmp_path / "figures.json").read_text())
    told = capsys.readouterr().out
    assert "source to store" in told and "encode_batch" in told
    ratio = figures["prepare_mb_per_s"] / figures["encode_batch_mb_per_s"]
    assert figures["ratio"] == pytest.approx(ratio, rel=0.2)
    assert figures["tokens"] > 1000 and figures["largest_process_mib"] > 50
