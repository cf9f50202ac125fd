"""What is stored of findings: records, outcomes recomputed from them, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kernels.errors import UserError
from scripts.reproduce import command
from tests.train.made_results import COLLAPSED, PACKING, made_record, store_made
from train.findings import FINDINGS
from train.findings.budgets import BUDGETS, difference, planned, pool_of, slug_of, told_settings
from train.findings.costs import resolution
from train.findings.draw import COLUMNS, draw, points_of
from train.findings.measures import CURVES, Record
from train.findings.page import (
    anchor,
    json_bytes,
    page,
    stem,
    store_outcomes,
    stored_noise,
    stored_outcome,
)
from train.findings.store import FOLDER, Results, stored_results
from train.findings.table import lines_of, markdown, outcome
from train.findings.verdicts import Verdict, judge

ROOT = Path(__file__).parents[2]
MINUTES = BUDGETS["minutes"]
NAMES = list(FINDINGS)


def test_a_record_is_what_was_stored(tmp_path):
    values = {"onset/onset_step": np.nan, "text/excess": 1 / 3}
    record = made_record("minutes", ("packing=document",), 1, values, {})
    path = tmp_path / "one.json"
    path.write_bytes(record.to_json())
    again = Record.from_json(path)
    assert np.isnan(again.values["onset/onset_step"])
    assert (again.own, again.seed, again.heads) == (record.own, 1, record.heads)
    pd.testing.assert_frame_equal(again.curves, record.curves, check_dtype=False, atol=1e-4)
    assert again.to_json() == path.read_bytes(), "stored once more it is the same file"
    assert len(path.read_bytes()) < 10_000
    for content in (b"{", b"{}", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="must be a stored run"):
            Record.from_json(path)


def test_stored_runs_of_other_settings_are_told():
    plan = planned(PACKING, BUDGETS["cpu"], PACKING.arms[0], 0)
    _, settings = plan.compose()
    from train.findings.budgets import told_settings

    stored = told_settings(settings)
    assert stored["model.num_layers"] == 2 and "seed" not in stored
    assert difference(stored, settings) is None
    assert (
        difference(stored | {"model.num_layers": 6}, settings) == "model.num_layers 6 there, 2 here"
    )
    # As the default run has it, so not among those told.
    assert (
        difference(stored | {"packing.eos": False}, settings)
        == "packing.eos False there, True here"
    )
    del stored["optimizer.lr"]
    assert "optimizer.lr" in difference(stored, settings)


def test_arms_of_one_setting_are_one_run():
    for names, slug in (
        ({"noise": 0, "packing": 0, "fixed_token": 0}, "baseline_seed=3"),
        ({"noise": 1, "emergence": 1, "attention_ops": 0}, "packing=causal_pinned_bos_seed=3"),
    ):
        plans = [
            planned(FINDINGS[name], MINUTES, FINDINGS[name].arms[arm], 3)
            for name, arm in names.items()
        ]
        assert {(plan.pool, plan.slug) for plan in plans} == {("minutes", slug)}
    every = [
        planned(finding, MINUTES, arm, 0)
        for finding in FINDINGS.values()
        for arm in finding.arms
        if arm.context_of is None
    ]
    assert len({plan.slug for plan in every}) == len({plan.own for plan in every})
    assert slug_of(("a.b=[0,1]",)) != slug_of(("a.b=[01]",))


@pytest.mark.parametrize("name", NAMES)
def test_findings_name_arms_and_curves_that_are_there(name):
    finding = FINDINGS[name]
    for budget in BUDGETS:
        arms = {arm.name for arm in finding.arms_of(budget)}
        assert len(arms) == len(finding.arms_of(budget)) and len(arms) > 1
        for claim in finding.claims_of(budget):
            assert set(claim.arms) <= arms and claim.direction
        assert {arm.context_of for arm in finding.arms_of(budget)} <= arms | {None}
        for panel in finding.panels_of(budget):
            assert set(panel.arms) <= arms and (len(panel.arms) == 1 or panel.kind != "layers")
    # Each is of some budget.
    for of_budget, all_there_are in (
        (finding.claims_of, finding.claims),
        (finding.panels_of, finding.panels),
    ):
        assert {one for budget in BUDGETS for one in of_budget(budget)} == set(all_there_are)
    measures = {panel.measures[0] for panel in finding.panels if panel.kind != "points"}
    assert measures <= set(CURVES)


def test_a_panel_shows_the_arms_that_it_names_and_four_are_two_by_two():
    finding = FINDINGS["attention_ops"]
    results = stored_results(finding, MINUTES, ROOT / FOLDER)
    drawn = points_of(results).groupby("panel")["arm"].unique()
    axes = draw(results).axes
    for index, panel in enumerate(finding.panels):
        named = panel.arms or tuple(results.records)
        arms = {arm for arm in named if results.records[arm]}
        assert set(drawn[index]) == arms != set()
        proxy = any("sigmoid" in arm for arm in arms)
        told = panel.title + (" (sigmoid: proxy)" if proxy else "")
        assert axes[index].get_title() == told
    cells = [axis.get_subplotspec() for axis in axes]
    places = [(cell.rowspan.start, cell.colspan.start) for cell in cells]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(finding.panels_of("paper")) == 3


def test_points_of_one_measure_can_be_compared_between_panels():
    limits = {}
    for name in ("fixed_token", "data_amount", "attention_ops"):
        results = stored_results(FINDINGS[name], MINUTES, ROOT / FOLDER)
        limits[name] = [axis.get_xlim() for axis in draw(results).axes]
        drawn = points_of(results)
        for panel, own in drawn[drawn["kind"] == "points"].groupby("panel"):
            left, right = limits[name][panel]
            assert left <= own["value"].min() and own["value"].max() <= right
    assert len(set(limits["fixed_token"])) == 1
    # Excess mass and nats have nothing in common, nor have rates and steps.
    assert len(set(limits["data_amount"][:2])) == 2
    assert [round(right) for _, right in limits["attention_ops"][1:]] == [1500, 1500, 6000]


def test_a_panel_without_data_has_no_part_in_the_others_limits():
    finding = FINDINGS["fixed_token"]
    results = stored_results(finding, MINUTES, ROOT / FOLDER)
    everything = draw(results).axes[1].get_xlim()
    some = results.records | {"fixed_1": {}, "random_1": {}, "random_2": {}}
    empty, *others = draw(Results(finding, MINUTES, some)).axes
    assert empty.get_xlim() == (0, 1) and others[0].get_xlim() == others[1].get_xlim()
    assert others[0].get_xlim()[1] < everything[1] < 1


def check_stored(folder: Path) -> int:
    """Recompute every outcome, data and page in a folder from its runs; how many there were."""
    count = 0
    for budget in BUDGETS.values():
        for finding in FINDINGS.values():
            path = folder / f"{stem(finding.name, budget)}.json"
            if not path.exists():
                continue
            results = stored_results(finding, budget, folder)
            told = outcome(results, stored_noise(budget, folder))
            assert json_bytes(told) == path.read_bytes(), path
            drawn = points_of(results).to_csv(index=False)
            assert drawn.encode() == path.with_suffix(".csv").read_bytes(), path
            assert path.with_suffix(".png").exists()
            count += 1
    if folder.with_suffix(".md").exists():
        assert folder.with_suffix(".md").read_text() == page(folder)
    return count


def test_what_the_repository_says_follows_from_its_stored_runs():
    folder = ROOT / FOLDER
    stored = [path for path in folder.glob("*.json")]
    assert check_stored(folder) == len(stored)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("noise", "emergence") else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
    ],
)
def test_stored_outcomes_are_recomputed_and_a_changed_one_is_found(tmp_path, name, capsys):
    folder = tmp_path / "findings"
    finding = FINDINGS[name]
    store_made(folder, finding, COLLAPSED, seeds=3)
    store_outcomes(name, MINUTES, folder)
    assert check_stored(folder) == 1
    points = pd.read_csv(folder / f"{name}.csv")
    assert tuple(points) == COLUMNS and len(points) > 10
    text = (tmp_path / "findings.md").read_text()
    assert finding.claim in text and f"findings/{name}.png" in text
    assert command([name, "--show", "--folder", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"\n# {finding.title} (minutes")
    assert finding.claim in shown and f"Setting: {finding.setting}." in shown
    assert f"- [{finding.title}](#{anchor(finding.title)})" in text
    for claim in stored_outcome(folder / f"{name}.json")["claims"]:
        assert claim["says"] in shown and claim["verdict"] in shown
    record = next((folder / "runs" / pool_of(finding, MINUTES)).iterdir())
    told = json.loads(record.read_bytes())
    told["values"] = {name: (value or 0) + 0.3 for name, value in told["values"].items()}
    record.write_text(json.dumps(told))
    with pytest.raises(AssertionError):
        check_stored(folder)
    shutil.rmtree(folder / "runs")
    assert command([name, "--show", "--folder", str(folder)]) == 2


def test_what_rests_on_new_runs_is_written_anew(tmp_path):
    folder = tmp_path / "findings"
    store_made(folder, FINDINGS["emergence"], seeds=2)
    paths = store_outcomes("emergence", MINUTES, folder)
    assert {path.name for path in paths} == {
        *(f"emergence.{ending}" for ending in ("json", "csv", "png")),
        "findings.md",
    }
    # Six more seeds of an arm that emergence has too, which asks for five.
    store_made(folder, FINDINGS["noise"], seeds=8)
    paths = store_outcomes("noise", MINUTES, folder)
    assert {"emergence.json", "emergence.png", "noise.json"} <= {path.name for path in paths}
    assert stored_outcome(folder / "emergence.json")["seeds"]["pinned"] == list(range(8))
    assert check_stored(folder) == 2
    again = store_outcomes("noise", MINUTES, folder)
    assert {path.name for path in again} == {"findings.md"}, "nothing else has changed"


def test_the_contents_of_the_page_are_its_headings():
    text = (ROOT / FOLDER).with_suffix(".md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    links = [line for line in text.splitlines() if line.startswith("- [")]
    assert links == [f"- [{title}](#{anchor(title)})" for title in headings]
    assert anchor("A sink, in CPU minutes (of 2-core machines)") == (
        "a-sink-in-cpu-minutes-of-2-core-machines"
    )


def test_the_page_has_what_is_stored_and_nothing_else(tmp_path):
    empty = page(tmp_path / "none")
    assert "##" not in empty and "%" not in empty


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pakcing"], "NAME must be among noise, packing"),
        ([], "NAME must be among"),
        (["noise:none"], "SEEDS of noise must be >= 1, got 'none'"),
        (["noise:0"], "SEEDS of noise must be >= 1, got '0'"),
        (["noise", "--budget", "hours"], "--budget must be one of cpu, minutes, paper"),
        (["noise", "--jobs", "0"], "--jobs must be >= 1"),
        (["noise", "--seconds", "-1"], "--seconds must be >= 0, got -1"),
        (["noise", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["noise", "--show"], "must have stored results of noise"),
        (["noise", "--arms", "pinned,causl"], "--arms must be among causal, pinned, got 'causl'"),
        (["noise", "--arms", "pinned", "--show"], "--arms must be without --show"),
        (["noise", "--arms", "pinned", "--plan"], "--arms must be without --plan"),
        (["noise", "--arms", "pinned", "--list"], "--arms must be without --list"),
        (["noise", "--only", "causal"], "--only must be ARM:SEED"),
    ],
)
def test_mistakes_end_in_one_line(arguments, told, capsys, tmp_path):
    assert command([*arguments, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and told in error


def test_the_list_tells_costs_and_what_can_be_told(tmp_path, capsys):
    assert command(["--list", "--folder", str(tmp_path)]) == 0
    before = capsys.readouterr().out
    assert all(name in before for name in NAMES) and "run noise first" in before
    store_made(tmp_path, FINDINGS["noise"], seeds=8)
    assert command(["--list", "--folder", str(tmp_path)]) == 0
    after = capsys.readouterr().out
    assert "16/16" in after and "13.3 min" in after and "run noise first" not in after
    # Of emergence the pinned arm is there, 50 s a run; the other is four times as long.
    assert "5/10" in after and "20.8 min" in after


def test_onsets_are_told_by_seed_with_their_errors_and_layers_in_their_order(tmp_path):
    finding = FINDINGS["emergence"]
    values = {"onset/low_step": 450, "onset/high_step": np.nan}
    store_made(tmp_path, finding, {"causal": values})
    results = stored_results(finding, MINUTES, tmp_path)
    for seed, record in results.records["causal"].items():
        # Layer 5 is the earliest, but in one seed alone.
        early = [(5, 0, 100 if seed == 0 else None), (4, 0, 900), (3, 0, 700), (0, 0, None)]
        results.records["causal"][seed] = replace(record, heads=early)
    told = outcome(results, {})
    assert [row["layer"] for row in told["layers"] if row["arm"] == "causal"] == [3, 4, 5, 0]
    assert [row["seed"] for row in told["onsets"]] == [0, 1, 2, 0, 1, 2]
    shown = "\n".join(lines_of(finding, MINUTES, told))
    assert "450 to after the end" in " ".join(shown.split()) and "475" in shown
    store_made(tmp_path, finding, {"causal": {"onset/onset_step": np.nan}})
    told = outcome(stored_results(finding, MINUTES, tmp_path), {})
    assert told["onsets"][0]["onset_step"] is None
    assert lines_of(finding, MINUTES, told)


def test_seeds_that_saw_other_data_are_told(tmp_path):
    finding = FINDINGS["noise"]
    store_made(tmp_path, finding)
    results = stored_results(finding, MINUTES, tmp_path)
    assert outcome(results, {})["mixed_data"] == []
    record = results.records["pinned"][1]
    made_by = record.made_by | {"data_sha256": "other"}
    results.records["pinned"][1] = replace(record, made_by=made_by)
    told = outcome(results, {})
    assert told["mixed_data"] == ["pinned"]
    assert any("other data: of pinned" in line for line in lines_of(finding, MINUTES, told))


def test_arms_that_saw_other_data_are_not_compared(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED)
    results = stored_results(PACKING, MINUTES, tmp_path)
    results.records["causal_pinned_bos"] = {
        seed: replace(one, made_by=one.made_by | {"data_sha256": "other"})
        for seed, one in results.records["causal_pinned_bos"].items()
    }
    verdicts = {claim.says: judge(claim, results, {}) for claim in PACKING.claims}
    told = next(one for says, one in verdicts.items() if "more than causal," in says)
    assert told.verdict is Verdict.undecided and "other data: of causal," in told.reason
    # Within an arm all is as it was; and other text that was asked for is no other data.
    assert verdicts[next(says for says in verdicts if "its sinks" in says)].verdict is Verdict.holds
    assert results.other_data(["causal", "document"]) == ""
    long = {
        s: replace(one, own=("corpus.min_document_tokens=9",), made_by={"data_sha256": "long"})
        for s, one in results.records["causal_long"].items()
    }
    results.records["causal_long"] = long
    assert results.other_data(["causal", "causal_long"]) == ""


def test_a_papers_effect_is_held_to_the_noise_of_rates(tmp_path):
    noise = {"text/excess": (1.0, 8), "bos_text/excess": (1.0, 8), "text/rate_030": (0.001, 8)}
    noise["bos_text/rate_030"] = (0.001, 8)
    told = resolution(PACKING, MINUTES, 5, noise)
    assert told.startswith("7 of 7 effects") and "in rate, 2" in told
    noise["text/rate_030"] = (0.3, 8)
    assert resolution(PACKING, MINUTES, 5, noise).startswith("4 of 7 effects")


def test_markdown_columns_are_aligned():
    assert markdown(["a", "b"], [["long", "1"]]) == ["| a    | b |", "| ---- | - |", "| long | 1 |"]


def test_records_from_before_a_kind_got_a_setting_are_the_same_arm():
    plan = planned(FINDINGS["attention_ops"], MINUTES, FINDINGS["attention_ops"].arms[1], 0)
    _, settings = plan.compose()
    stored = told_settings(settings)
    assert stored["attention.kind"] == "sigmoid" and stored.pop("attention.bias") == 0.0
    assert difference(stored, settings) is None
    settings["attention"]["bias"] = -1.0
    assert difference(stored, settings) == "attention.bias 0.0 there, -1.0 here"
