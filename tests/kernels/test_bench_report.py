"""What the benchmark prints, writes and refuses: claims, the table, the command line."""

import json
import sys

import pytest
import torch

from kernels.bench.__main__ import command, main, parse
from kernels.bench.cases import select_cases
from kernels.bench.claims import CUDNN_TARGETS, claims
from kernels.bench.contenders import taking_part
from kernels.bench.table import summary, write_json
from kernels.errors import UserError
from tests.kernels.benched import OURS


def record(shape, implementation, total, mask="causal", **changes):
    return {
        "shape": list(shape),
        "groups": shape[1],
        "mask": mask,
        "dtype": "bf16",
        "implementation": implementation,
        "variant": "BTHD",
        "forward_ms": total / 4,
        "backward_ms": total * 3 / 4,
        "total_ms": total,
        "spread_ms": {"forward": 0.01, "backward": 0.01, "total": 0.01},
        "peak_mib": 500.0,
        "tflops": 400.0,
        "share_of_peak": 0.4,
        "timed_by": "cuda_graph",
        "mean_mass_error": 1e-5,
        **changes,
    }


MAIN, LONG, WIDE = CUDNN_TARGETS


def test_claims_from_records():
    long_row = (4, 12, 16384, 64)
    records = [
        record(MAIN, "sinklab", 1.96),
        record(MAIN, "sinklab+stats", 2.0),
        record(MAIN, "sinklab+full", 2.04),
        record(MAIN, "cudnn", 2.0),
        record(MAIN, "flash", 3.0),
        record(MAIN, "flex", 2.6),
        record(LONG, "sinklab", 10.0),
        record(LONG, "sinklab+stats", 10.5, mean_mass_error=2e-3),
        record(LONG, "cudnn", 10.0),
        record(LONG, "flex", 11.0),
        record(WIDE, "sinklab+stats", 2.2),
        record(WIDE, "cudnn", 1.8),
        record((16, 12, 2048, 96), "sinklab+stats", 1.65),
        record(MAIN, "sinklab+stats", 1.0, "documents"),
        record(MAIN, "flex", 1.5, "documents"),
        record(long_row, "sinklab+stats", 20.0, peak_mib=510.0),
        record(long_row, "flash", 40.0),
    ]
    found = [(c.what, round(c.measured, 4), c.status) for c in claims(records) if c.measured]
    assert found == [
        ("basic / cudnn", 1.0, "met"),
        ("basic / cudnn", 1.05, "floor"),
        ("basic / cudnn", round(2.2 / 1.8, 4), "MISSED"),
        ("flex / basic, causal, D < 128", round(11 / 10.5, 4), "MISSED"),
        ("flash / basic, causal", 1.5, "met"),
        ("flex / basic, documents", 1.5, "met"),
        ("basic / off, median", round((2 / 1.96 + 1.05) / 2, 4), "MISSED"),
        ("basic / off, worst", 1.05, "MISSED"),
        ("full / off, worst", round(2.04 / 1.96, 4), "met"),
        ("time per FLOP, D 96 / D 128", 1.0, "met"),
        ("largest error of a mean mass", 0.002, "MISSED"),
        ("peak memory at 16k, basic / flash", 1.02, "met"),
    ]
    unmeasured = [c.what for c in claims(records) if c.status == "not measured"]
    assert unmeasured == ["flex / basic, causal, D >= 128"]
    weakest = next(c for c in claims(records) if c.what == "flex / basic, causal, D < 128")
    assert weakest.where == "8,12,8192,64 causal"


def test_grouped_heads_make_no_claim():
    grouped = [record(MAIN, name, 2.0, groups=4) for name in ("sinklab+stats", "cudnn", "flex")]
    statuses = {claim.what: claim.status for claim in claims(grouped)}
    assert statuses["basic / cudnn"] == statuses["flex / basic, causal, D < 128"] == "not measured"


def test_the_summary_of_a_record_fits_what_a_device_call_returns():
    cases = select_cases("record", [], None, 0, "bf16")
    records = [
        record(case.shape, contender.name, 123.456, case.mask)
        for case in cases
        for contender in taking_part(case, [])
    ]
    text = summary(records)
    assert len(text) < 12_000
    for case in cases:
        assert text.count(case.label) >= 2
    lines = text.splitlines()
    assert lines[1].split() == [
        *("off", "basic", "full", "cudnn", "flash", "flex", "varlen", "written", "2nd", "pass"),
    ]


def test_ratios_of_one_shape():
    text = summary([record(MAIN, "sinklab+stats", 2.0), record(MAIN, "cudnn", 1.6)])
    (row,) = [line for line in text.splitlines() if "1.250" in line and "claims" not in line][:1]
    assert row.split()[:3] == ["32,12,2048,64", "causal", "1.250"]
    assert "MISSED" in text


def test_a_summary_of_nothing():
    assert "not measured" in summary([])


def test_json_is_a_list_with_the_environment_first(tmp_path):
    path = tmp_path / "new" / "bench.json"
    rows = [record(MAIN, "cudnn", 2.0)]
    write_json(path, {"device": "card"}, rows)
    assert json.loads(path.read_text()) == [{"environment": {"device": "card"}}, *rows]
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


# Mistakes


MISTAKES = {
    "shape_words": (["--shape", "8,x,64"], "--shape must be B,H,T,D, four whole numbers, got"),
    "shape_three": (["--shape", "8,12,64"], "--shape must be B,H,T,D, four whole numbers, got"),
    "shape_zero": (["--shape", "0,12,64,64"], "--shape batch must be >= 1, got 0"),
    "shape_long": (["--shape", "1,1,32768,64"], "--shape length must be 16 to 16384, got 32768"),
    "head_dim": (["--shape", "1,1,64,20"], "--shape head dim must be a multiple of 8 from 16 to"),
    "groups": (["--groups", "5"], "--groups must be >= 1 and divide the 12 heads, got 5"),
    "mask": (["--mask", "window"], "argument --mask: invalid choice: 'window'"),
    "only": (["--only", "cudnn,cuddn"], "--only must be some of sinklab, sinklab+stats"),
    "rounds": (["--rounds", "1"], "--rounds must be >= 2, got 1"),
    "two_ways": (["--preset", "quick", "--shape", "1,1,64,64"], "--shape can't be combined with"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(mistake, monkeypatch, capsys):
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["kernels.bench", *arguments])
    assert command() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be a CUDA GPU, got none"):
        main(["--preset", "quick"])


def test_a_profile_is_of_one_case():
    options = parse(["--profile", "4,2,64,32", "--groups", "1"])
    assert [case.label for case in options.cases] == ["4,2,64,32 G1 causal"]
    options = parse(["--profile", "4,2,64,32", "--mask", "documents"])
    assert [case.mask for case in options.cases] == ["documents"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_shape_on_a_gpu(tmp_path, capsys):
    """Everything but what compiles for minutes: captured, measured, and no note of a failure."""
    path = tmp_path / "out.json"
    names = [*OURS, "cudnn", "flash", "flash_varlen", "materialised"]
    chosen = ["--shape", "2,2,256,64", "--only", ",".join(names)]
    assert main([*chosen, "--rounds", "2", "--json", str(path)]) == 0
    environment, *records = json.loads(path.read_text())
    assert environment["environment"]["notes"] == []
    assert {(record["mask"], record["implementation"]) for record in records} == {
        (case.mask, contender.name)
        for case in select_cases("quick", ["2,2,256,64"], None, 0, "bf16")
        for contender in taking_part(case, names)
    }
    for record in records:
        by_graph = record["implementation"] != "materialised"
        assert record["timed_by"] == ("cuda_graph" if by_graph else "events")
        assert record["peak_mib"] > 0 and record["total_ms"] > 0
    assert main(["--profile", "2,2,256,64"]) == 0
    assert "us a forward and backward" in capsys.readouterr().out
