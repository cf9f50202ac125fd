"""The benchmark of the loader: what it prints and writes, on rows too few to say anything."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from scripts import bench_data

TINY = ["--seconds", "0.01", "packing.context=64", "packing.batch_tokens=128"]


@pytest.fixture
def settings(corpus_file, cache_dir) -> list[str]:
    return [
        *TINY,
        "corpus=files",
        f"corpus.paths=[{corpus_file}]",
        "tokenizer.vocab_size=300",
        f"cache_dir={cache_dir}",
    ]


def test_both_packers_with_a_worker_and_without(settings, tmp_path, capsys):
    path = tmp_path / "rates.json"
    bench_data.main(["--json", str(path), *settings])
    rows = json.loads(path.read_text())
    assert [(row["packer"], row["num_workers"]) for row in rows] == [
        (packer, workers) for packer in ("chunk", "best_fit") for workers in (1, 0)
    ]
    for row in rows:
        assert (row["context"], row["batch_rows"]) == (64, 2)
        assert row["tokens_per_second"] >= row["median_tokens_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "chunk, 1 worker",
        "chunk, no worker",
        "best_fit, 1 worker",
        "best_fit, no worker",
    ]
    assert all(
        re.fullmatch(r".*: at best \d+\.\d M tokens/s \(median \d+\.\d\)", line) for line in lines
    )


def test_a_packer_that_is_chosen_is_the_only_one(settings, capsys):
    bench_data.main([*settings, "packing.packer=single", "packing.mask=causal"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["single", "single"]


def test_a_rate_counts_every_token_of_its_slice(monkeypatch):
    """A clock that only batches of 20 tokens move, by a second each."""
    seconds = [0.0]

    def batches():
        while True:
            seconds[0] += 1
            yield SimpleNamespace(tokens_BT=torch.zeros(2, 10))

    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: seconds[0])
    rates = bench_data.tokens_per_second(batches(), 3 * bench_data.SLICES)
    assert rates == [20.0] * bench_data.SLICES
    assert seconds[0] == bench_data.WARM_UP + 3 * bench_data.SLICES
