"""The command around the bench of whole training runs: arguments, mistakes, its file."""

import math

import pytest
import torch

from kernels.errors import UserError
from scripts.bench.__main__ import main, parsed
from scripts.bench.measure import agreement
from scripts.bench.settings import bench_overrides
from scripts.bench.table import merged, read_entries, written
from train.config import compose
from train.mistakes import exit_code


def test_disagreement():
    losses = {"sinklab+stats": [5.0, 4.0], "sinklab": [5.01], "plain": [5.0, 4.03]}
    lines, apart = agreement(losses, 0.02)
    assert lines[1] == "loss of step 2: sinklab+stats 4.00000, plain 4.03000"
    assert apart == lines[1:]
    losses["plain"][-1] = math.nan
    assert len(agreement(losses, 0.02)[1]) == 1
    losses["plain"][-1] = 4.01
    assert agreement(losses, 0.02)[1] == []


def test_disagreement_is_a_line_after_the_table(tmp_path, monkeypatch, capsys):
    """The other presets are written."""
    shape = {"micro_batches": 2, "rows": 8, "context": 128, "vocab_size": 512, "parked": False}
    # No peak and no MFU on a CPU.
    entry = shape | {
        "implementation": "sinklab+stats",
        "tokens_per_second": 15555,
        "mfu": None,
        "peak_gib": None,
        "ms": 131.66,
        "spread_ms": 5.78,
        "ratio_to_plain": 0.915,
        "seconds_to_first_step": 0.7,
        "split_ms": {"data": 4.4, "forward": 127.3},
    }
    apart = ["default: loss of step 50: sinklab+stats 4.97532, plain 5.02830"]
    monkeypatch.setattr(
        "scripts.bench.__main__.measure",
        lambda preset, *_: (
            [entry | {"preset": preset}],
            apart if preset == "default" else [],
        ),
    )
    path = tmp_path / "bench.json"
    assert exit_code(main, ["--presets", "default", "1b", "--json", str(path)]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith(
        f"error: {apart[0]}: more than --tolerance 0.02 nats apart after --agree"
    )
    assert line.endswith(f"aren't written to {path}")
    assert "default: 2 micro-batches" in told.out and "1b: 2 micro-batches" in told.out
    row, _ = [x for x in told.out.splitlines() if x.startswith("sinklab+stats ")]
    assert row.split()[1:] == ["15,555", "-", "-", "131.66", "5.78", "0.915", "0.7", "s"]
    assert {entry.get("preset") for entry in read_entries(path)[1:]} == {"1b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "gu6m"], "--presets must be among gu60m, barbero120m, 1b, default"),
        (["--rounds", "1"], "--rounds must be >= 2, got 1"),
        (["--rows", "0"], "--rows must be >= 1, got 0"),
        (["--presets", "default", "--fast"], "must be an option or an override NAME=VALUE"),
        (["tracking.statistics=off"], "tracking.statistics must not be off"),
        (["tracking.log_every=7", "tracking.sinks_every=31"], "tracking.log_every and tracking"),
        (["packing.contxt=3"], "contxt"),
        (["--json", "no/such/file.json"], "--json must be in a folder that exists"),
        (["--json", "docs"], "--json must be a file, not a folder, got 'docs'"),
        (["--json", "docs/bench/kinds-h100.json"], "--json must name a file of this bench or none"),
    ],
)
def test_mistakes_are_one_line(arguments, message, cache_dir, capsys):
    presets = [] if "--presets" in arguments else ["--presets", "default"]
    assert exit_code(main, [*presets, *arguments, "debug=cpu", f"cache_dir={cache_dir}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_line():
    _, presets, overrides = parsed(
        ["--presets", "gu60m", "1b", "corpus=austen", "--rows", "4", "a=b"]
    )
    assert presets == ["gu60m", "1b"] and overrides == ["corpus=austen", "a=b"]


def test_the_default_is_what_the_machine_can_time(monkeypatch, capsys):
    for has_gpu, names in ((True, ["gu60m", "barbero120m", "1b"]), (False, ["cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert parsed([])[1] == names
    # Seconds on a CPU, and at a rate at which losses can be compared unless another is given.
    config, _ = compose(bench_overrides("cpu", []))
    assert (config.packing.batch_tokens, config.model.num_layers) == (2048, 2)
    assert config.optimizer.lr == 4e-4
    given = compose(bench_overrides("default", ["optimizer.lr=1e-3"]))[0]
    assert given.optimizer.lr == 1e-3
    with pytest.raises(SystemExit):
        parsed(["--help"])
    told = capsys.readouterr().out
    assert "[options] [overrides]" in told and "50 by default" in told and "0.02 by default" in told


def test_a_new_bench_replaces_its_presets_only(tmp_path):
    old, new = {"torch": "1"}, {"torch": "2"}
    kept = merged([], old, [{"preset": "a", "ms": 1}])
    kept = merged(kept, old, [{"preset": "b", "ms": 1}])
    assert kept[0] == {"environment": old, "presets": ["a", "b"]}
    kept = merged(kept, new, [{"preset": "a", "ms": 2}])
    assert kept == [
        {"environment": old, "presets": ["b"]},
        {"preset": "b", "ms": 1},
        {"environment": new, "presets": ["a"]},
        {"preset": "a", "ms": 2},
    ]
    path = tmp_path / "bench.json"
    assert read_entries(path) == []
    path.write_text(written(kept))
    assert read_entries(path) == kept
    for foreign in (b'{"a": 1}', b"not json", b"\xff\xfe", b'[{"environment": {"torch": "1"}}]'):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="--json must name a file of this bench"):
            read_entries(path)
    with pytest.raises(UserError, match="--json must be a file, not a folder"):
        read_entries(tmp_path)
