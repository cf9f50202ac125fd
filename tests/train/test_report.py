"""The report: what it gathers, what its tables say, and a page that needs nothing but itself."""

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts.report import command
from tests.train.made_runs import BASELINE, add_probes, json_block, made_run
from train.report import figures
from train.report.curves import log_spaced, mean_and_range, thinned
from train.report.gather import gather
from train.report.record import draw_record
from train.runs import load_run

# Its runs are made once, by one worker.
pytestmark = pytest.mark.xdist_group("report")

STEPS = sorted({*np.geomspace(1, 3000, 40).astype(int).tolist()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two arms of probabilities, one of two seeds, and an arm of proxies."""
    folder = tmp_path_factory.mktemp("runs")
    pinned = "packing=causal_pinned_bos"
    made = {
        "pinned": ([pinned], STEPS[20], "probability"),
        "pinned_1": ([pinned, "seed=1", "data_seed=1"], STEPS[25], "probability"),
        "plain": (["packing=causal"], None, "probability"),
        "sigmoid": ([pinned, "attention=sigmoid"], STEPS[30], "proxy"),
    }
    paths = {
        name: made_run(folder / name, *overrides, steps=STEPS, onset=onset, kind=kind)
        for name, (overrides, onset, kind) in made.items()
    }
    add_probes(paths["pinned"], "e" * 64, {STEPS[10]: 0.2, STEPS[30]: 0.4})
    add_probes(paths["plain"], "e" * 64, {STEPS[10]: 0.1})
    return paths


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    """The folder in which the command wrote report.html and figures/."""
    folder = tmp_path_factory.mktemp("report")
    where = ["--out", str(folder / "report.html"), "--figures", str(folder / "figures")]
    with redirect_stdout(io.StringIO()) as told:
        assert command([*map(str, runs.values()), *where]) == 0
    (folder / "told.txt").write_text(told.getvalue())
    return folder


@pytest.fixture(scope="module")
def page(report) -> str:
    return (report / "report.html").read_text()


def text_of(html: str) -> str:
    body = html[html.index("<body>") : html.index('<script id="figures"')]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def row_of(page: str, table: int, begins: str) -> list[str]:
    """Cells of the row of a table (by its number in the page) that begins so."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("<table")[table + 1], re.S)
    cells = [re.findall(r"<td>(.*?)</td>", row, re.S) for row in rows]
    plain = [[re.sub("<br>", " ", re.sub("<span.*?</span>", "", c)) for c in row] for row in cells]
    return next(row for row in plain if row and row[0].startswith(begins))


def test_runs_that_differ_in_seeds_are_one_arm(runs):
    found, arms = gather(list(runs.values()))
    assert [(run.name, run.arm) for run in found] == [
        ("pinned", 0),
        ("pinned_1", 0),
        ("plain", 1),
        ("sigmoid", 2),
    ]
    assert [arm.knows_bos for arm in arms] == [True, False, True]
    assert [arm.is_proxy for arm in arms] == [False, False, True]
    assert arms[2].name == f"{arms[2].label} (proxy)" and arms[0].name == arms[0].label
    assert len({arm.colour for arm in arms}) == 3
    assert found[0].probe_sets == ("e" * 64,) and found[0].sink_heads() == (8, 8)
    curve = arms[0].curve("sink/excess")
    middle = curve[curve["step"].between(STEPS[20], STEPS[25] - 1)]
    np.testing.assert_allclose(middle["low"], 0, atol=1e-12)
    np.testing.assert_allclose(middle["high"], 0.7 - BASELINE)
    np.testing.assert_allclose(middle["mean"], (0.7 - BASELINE) / 2)


def test_a_run_named_twice_is_read_once_and_names_are_told_apart(runs, tmp_path):
    found, _ = gather([runs["plain"], runs["plain"] / ".", runs["pinned"]])
    assert [run.name for run in found] == ["plain", "pinned"]
    other = made_run(tmp_path / "plain", "seed=3", steps=[1, 2], onset=None)
    found, _ = gather([runs["plain"], other])
    assert [run.name for run in found] == [str(runs["plain"]), str(other)]


def test_means_are_taken_where_all_curves_are():
    one = pd.DataFrame({"step": [1, 2, 4], "tokens": [10, 20, 40], "value": [0.0, 1.0, 2.0]})
    other = pd.DataFrame({"step": [2, 3, 4], "tokens": [20, 30, 40], "value": [3.0, 3.0, 5.0]})
    curve = mean_and_range([one, one[:0], other])
    assert curve["step"].tolist() == [2, 4] and curve["tokens"].tolist() == [20, 40]
    assert curve["mean"].tolist() == [2.0, 3.5]
    assert curve["low"].tolist() == [1.0, 2.0] and curve["high"].tolist() == [3.0, 5.0]
    assert mean_and_range([one[:0]]).empty


def test_many_records_are_thinned_evenly_over_the_logarithm():
    steps = log_spaced(range(10, 100_001, 10), 30)
    assert (steps[0], steps[-1]) == (10, 100_000) and 25 <= len(steps) <= 30
    ratios = np.diff(np.log(steps[8:]))
    assert ratios.max() < 1.15 * ratios.min()
    assert log_spaced([5, 3, 3, 0], 30) == [0, 3, 5]
    curve = pd.DataFrame({"step": [0, 1, 2], "value": 1.0})
    assert thinned(curve)["step"].tolist() == [1, 2], "0 has no logarithm"


def test_the_arms_table_says_what_came_out(page):
    pinned = row_of(page, 0, "packing.bos=pinned, attention=softmax")
    assert pinned[1:6] == ["0, 1", "3.072M", "0.700 (0.700 to 0.700)", "0.074", "8/8 8/8"]
    spacing = [STEPS[20] - STEPS[19], STEPS[25] - STEPS[24]]
    for seed, index in enumerate((20, 25)):
        told = f"{STEPS[index]:,} −{spacing[seed]:,} [{STEPS[index]:,}, {STEPS[index]:,}]"
        assert told in pinned[7]
    assert pinned[9] == "0.500 (0.500 to 0.500)"
    plain = row_of(page, 0, "packing.bos=none")
    assert plain[5] == "0/8" and plain[7] == f"&gt; {STEPS[-1]:,}"
    assert plain[9] == "0.500 BOS untrained"
    assert row_of(page, 0, "packing.bos=pinned, attention=sigmoid")[0].endswith("(proxy)")


def test_onsets_settings_and_provenance_have_their_tables(page, runs):
    onset = row_of(page, 1, "pinned_1")
    step, before = STEPS[25], STEPS[24]
    assert onset[2] == f"{step:,} −{step - before:,}"
    # From the settings, through the warm-up: metrics.csv has no rates here.
    config = load_run(runs["pinned_1"]).config
    factors = [config.schedule.factor(n, config.trainer.max_steps) for n in range(step)]
    assert config.schedule.warmup_steps > 1 and factors[0] < 1
    lr = config.optimizer.lr
    assert onset[5] == f"{lr * sum(factors):.3g} −{lr * sum(factors[before:]):.2g}"
    assert row_of(page, 1, "plain")[3] == "censored"
    assert row_of(page, 2, "sigmoid") == ["sigmoid", "pinned", "sigmoid", "0", "0"]
    provenance = row_of(page, 3, "pinned")
    assert provenance[2] == "c" * 12 + " + changes" and provenance[7] == "e" * 12
    assert row_of(page, 3, "sigmoid")[7] == "none"


def test_probes_of_kept_checkpoints_have_a_column_and_a_figure(page, report, tmp_path):
    assert page.count("cost of hiding position 0, nats") == 1
    # On what the arm was trained on: three times the excess with a BOS, twice without.
    assert row_of(page, 0, "packing.bos=pinned, attention=softmax")[10] == "1.200"
    assert row_of(page, 0, "packing.bos=none")[10] == "0.200"
    assert row_of(page, 0, "packing.bos=pinned, attention=sigmoid")[10] == "–"
    traces = json_block(page, "figures")["kept_excess"]["data"]
    lines = {t["legendgroup"]: t for t in traces if t["mode"] == "lines+markers"}
    assert lines["arm 0"]["x"] == [STEPS[10], STEPS[30]] and lines["arm 0"]["y"] == [0.2, 0.4]
    assert lines["arm 1"]["y"] == [0.1] and len(lines) == 2
    titles = json_block(page, "figures")["kept_excess"]["layout"]["annotations"]
    assert [t["text"] for t in titles] == ["text", "uniform attention"], "no empty panel"
    without = made_run(tmp_path / "without", steps=[1, 2], onset=None)
    assert command([str(without), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "cost of hiding position 0, nats" not in page
    assert "kept_excess" not in json_block(page, "figures")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> list[Path]:
    """Two seeds of one arm and one of another, of 3000 steps; seed 1 has done 500 or so."""
    folder = tmp_path_factory.mktemp("unfinished")
    plan = ["packing=causal_pinned_bos", "trainer.max_steps=3000"]
    half = [step for step in STEPS if step <= 500]
    return [
        made_run(folder / "seed_0", *plan, steps=STEPS, onset=STEPS[-5]),
        made_run(folder / "seed_1", *plan, "seed=1", steps=half, onset=None),
        made_run(folder / "other", "packing=causal", plan[1], steps=STEPS, onset=None),
    ]


def test_an_unfinished_seed_is_compared_at_the_same_step_and_marked(unfinished, tmp_path):
    _, (arm, other) = gather(unfinished)
    last = max(step for step in STEPS if step <= 500)
    done = f"{1.024 * last:.4g}k of 3.072M tokens"
    assert (arm.until, arm.behind, other.behind) == (last, [f"seed 1/0 at {done}"], [])
    # Seed 0 became a sink after seed 1's last step.
    assert arm.last("sink/mass") == pytest.approx([BASELINE, BASELINE])
    held_out = max(step for step in STEPS[1::2] if step <= 500)
    loss = 5 - 0.1 * np.log(held_out)
    assert arm.last("val/canonical_loss") == pytest.approx([loss, loss + 0.25])
    assert arm.mass_against_loss()["loss"].tolist() == arm.last("val/canonical_loss")
    out = tmp_path / "report.html"
    assert command([*map(str, unfinished), "--out", str(out)]) == 0
    page = out.read_text()
    row = row_of(page, 0, "packing.bos=pinned")
    assert row[2] == f"{1.024 * last:.4g}k" and row[4] == "0.074" and row[5] == "0/8 0/8"
    assert page.count(f">seed 1/0 at {done}</span>") == 1
    for figure in json_block(page, "figures").values():
        lines = [t for t in figure["data"] if t.get("legendgroup") == "arm 0"]
        assert all(f"seed 1/0 at {done}" in line["name"] for line in lines)


def test_a_seed_without_a_row_is_left_out_and_marked(unfinished, tmp_path):
    young = made_run(
        *(tmp_path / "young", "packing=causal_pinned_bos", "trainer.max_steps=3000", "seed=2"),
        steps=[1],
        onset=None,
    )
    (young / "metrics.csv").unlink()
    _, (arm,) = gather([unfinished[0], young])
    assert arm.behind == ["seed 2/0 at 0 of 3.072M tokens"] and arm.until == STEPS[-1]
    first, second = arm.last("sink/mass")
    assert first == pytest.approx(0.7) and np.isnan(second)


def test_of_a_repeated_row_the_later_counts(tmp_path):
    path = made_run(tmp_path / "again", "seed=5", steps=[1, 2, 4], onset=None)
    with (path / "metrics.csv").open("a") as file:
        table = pd.read_csv(path / "metrics.csv")
        table[table["step"] == 2].assign(**{"sink/excess": 0.5}).to_csv(
            file, header=False, index=False
        )
    _, (arm,) = gather([path, made_run(tmp_path / "once", "seed=6", steps=[1, 2], onset=None)])
    curve = arm.curve("sink/excess")
    assert curve["step"].tolist() == [1, 2]
    np.testing.assert_allclose(curve["high"], [0, 0.5], atol=1e-12)


def test_one_baseline_is_drawn_for_arms_that_share_it(runs, tmp_path):
    young = made_run(tmp_path / "young", "attention=off_by_one", steps=[1], onset=None)
    (young / "metrics.csv").unlink()
    short = made_run(tmp_path / "short", "attention=sink_logit", steps=STEPS[:9], onset=None)
    _, arms = gather([young, short, runs["plain"]])
    lines = [t for t in figures.mass(arms).data if t.name == "uniform attention"]
    assert len(lines) == 1 and lines[0].legendgroup == "baseline" and lines[0].x[-1] == STEPS[-1]
    table = pd.read_csv(short / "metrics.csv")
    table.assign(**{"sink/baseline": 0.2}).to_csv(short / "metrics.csv", index=False)
    _, arms = gather([young, short, runs["plain"]])
    lines = [t for t in figures.mass(arms).data if t.name == "uniform attention"]
    assert [line.legendgroup for line in lines] == ["arm 1", "arm 2"]


def test_figures_hold_the_stored_values(page, runs):
    figures = json_block(page, "figures")
    excess = figures["excess_mass"]
    line = next(trace for trace in excess["data"] if trace["name"] == "pinned_1")
    assert line["visible"] == "legendonly" and line["x"] == STEPS
    metrics = pd.read_csv(runs["pinned_1"] / "metrics.csv")
    np.testing.assert_allclose(line["y"], metrics["sink/excess"], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(line["meta"]["tokens"], metrics["tokens"])
    heads = json_block(page, "details")["pinned_1"]["head_maps"]
    table = pd.read_parquet(runs["pinned_1"] / "sinks")
    assert len(heads["frames"]) <= 30 and heads["frames"][-1]["name"] == str(STEPS[-1])
    for frame in heads["frames"]:
        stored = table[table["step"] == int(frame["name"])]
        expected = stored.pivot(index="layer", columns="head", values="alpha")
        np.testing.assert_allclose(frame["data"][0]["z"], expected, rtol=1e-5)
    assert heads["layout"]["sliders"][0]["active"] == len(heads["frames"]) - 1


def test_proxies_are_never_on_an_axis_unmarked(page):
    figures = json_block(page, "figures")
    for name in ("excess_mass", "mass", "rate", "probe_excess", "mass_against_loss"):
        assert "proxy where marked" in figures[name]["layout"]["yaxis"]["title"]["text"], name
        proxies = [t for t in figures[name]["data"] if t.get("legendgroup") == "arm 2"]
        assert proxies and all("proxy" in trace["name"] for trace in proxies), name
    heads = json_block(page, "details")
    assert "proxy" in heads["sigmoid"]["head_maps"]["data"][0]["colorbar"]["title"]["text"]
    assert "proxy" not in str(heads["pinned"]["head_maps"]["data"][0]["colorbar"])


def test_an_arm_has_one_colour_everywhere(page):
    colours: dict[str, set] = {}
    for figure in json_block(page, "figures").values():
        for trace in figure["data"]:
            group = trace.get("legendgroup", "")
            drawn = trace.get("line", {}).get("color") or trace.get("fillcolor")
            drawn = drawn or trace["marker"]["color"]
            if group.startswith("arm"):
                colours.setdefault(group, set()).add(drawn)
    assert len(colours) == 3 and all(len(drawn) == 1 for drawn in colours.values())
    assert len(set.union(*colours.values())) == 3


def test_the_page_is_one_file(page):
    assert page.count("plotly.js v") == 1
    assert len(page.encode()) < 6_000_000
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"https?://", outside)
    assert re.findall(r'(?:src|href)="(.*?)"', outside) == ["data:,"]
    assert "default-src 'none'" in outside


def test_names_are_text_whatever_they_hold(tmp_path):
    name = 'a<b>&c  %{x} "d'
    path = made_run(tmp_path / name, "seed=5", steps=[1, 2], onset=None)
    out = tmp_path / "report.html"
    assert command([str(path), "--out", str(out)]) == 0
    page = out.read_text()
    told = "a&lt;b&gt;&amp;c  %{x} &quot;d"
    assert "a<b>" not in page and f'<option value="{told}">{told}</option>' in page
    assert name in json_block(page, "details")
    traces = json_block(page, "figures")["excess_mass"]["data"]
    hovers = [trace["hovertemplate"] for trace in traces if "hovertemplate" in trace]
    assert all("%{x}" not in hover and "%&#123;x}" in hover for hover in hovers) and hovers


def test_a_run_that_has_just_begun_is_shown_without_figures(tmp_path, capsys):
    path = made_run(tmp_path / "young", "seed=5", steps=[1], onset=None)
    for part in (path / "sinks").iterdir():
        part.unlink()
    (path / "metrics.csv").unlink()
    out = tmp_path / "report.html"
    figures = tmp_path / "figures"
    assert command([str(path), "--out", str(out), "--figures", str(figures)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    page = out.read_text()
    assert json_block(page, "figures") == {} and json_block(page, "details") == {}
    assert "No record of the first key in: young." in text_of(page)
    assert row_of(page, 1, "young")[2:] == ["–"] * 6


def test_figures_of_record_and_a_line_a_file(report, runs, tmp_path):
    names = ("excess_mass", "mass_against_loss", "norm_ratios")
    drawn = [report / "figures" / f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    told = (report / "told.txt").read_text().splitlines()
    assert told == [str(path) for path in (report / "report.html", *drawn)]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")
    svg = drawn[1].read_bytes()
    assert b"<svg" in svg
    _, arms = gather(list(runs.values()))
    again = draw_record(arms, tmp_path)
    assert again[1].read_bytes() == svg, "the same bytes for the same runs"


def test_mistakes_are_one_line(runs, tmp_path, capsys, monkeypatch):
    def line(*arguments: str) -> str:
        assert command([*arguments]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        return told.err

    run, out = str(runs["plain"]), str(tmp_path / "out.html")
    assert "RUN must name at least one run folder" in line("--out", out)
    assert str(tmp_path / "nowhere") in line(str(tmp_path / "nowhere"), "--out", out)
    assert "config.yaml" in line(run, str(tmp_path), "--out", out)
    assert "--out must lie in an existing folder" in line(run, "--out", str(tmp_path / "a" / "b"))
    assert "--out must be a file" in line(run, "--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "--figures must be a folder" in line(
        run, "--out", out, "--figures", str(tmp_path / "file")
    )
    assert not Path(out).exists()
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "pip install 'sinklab[report]'" in line(run, "--out", out)
