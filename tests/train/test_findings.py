"""Verdicts on stored results whose effects are known, and what is stored in the repository."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kernels.errors import UserError
from scripts.reproduce import command
from tests.train.made_results import COLLAPSED, PACKING, STEPS, fewer_keys, made_record, store_made
from train.findings import FINDINGS
from train.findings.base import AtLeast, AtMost, Claim, Near, Of
from train.findings.budgets import BUDGETS, difference, planned, slug_of
from train.findings.draw import COLUMNS, points_of
from train.findings.measures import CURVES, Record, rounded
from train.findings.page import (
    json_bytes,
    page,
    stem,
    store_outcomes,
    stored_noise,
    stored_outcome,
)
from train.findings.statistics import smallest_effect, t_quantile
from train.findings.store import FOLDER, stored_results
from train.findings.table import markdown, outcome
from train.findings.verdicts import Verdict, judge, noise_of, unstable_from

ROOT = Path(__file__).parents[2]
MINUTES = BUDGETS["minutes"]
NAMES = list(FINDINGS)


def judged(folder: Path, says: str, noise=None, finding=PACKING, budget=MINUTES):
    (claim,) = (claim for claim in finding.claims if says in claim.says)
    return judge(claim, stored_results(finding, budget, folder), noise or {})


def verdicts(folder: Path, says: str, **more) -> tuple[Verdict, Verdict, Verdict]:
    return judged(folder, says, **more)[:3]


def changed(arm: str, **values: float) -> dict:
    """The paper's outcome with some values of an arm replaced; ``_in_`` stands for ``/``."""
    named = {name.replace("_in_", "/"): value for name, value in values.items()}
    return COLLAPSED | {arm: COLLAPSED.get(arm, {}) | named}


def test_a_known_effect_holds_in_direction_and_magnitude(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED)
    fewer_keys(tmp_path)
    results = stored_results(PACKING, MINUTES, tmp_path)
    for claim in PACKING.claims:
        told = judge(claim, results, {})
        assert told.verdict == told.direction == Verdict.holds, (claim.says, told.reason)
        assert told.magnitude is (Verdict.holds if claim.magnitude else Verdict.no_number)
        assert told.seeds == 3
        if claim.effect is not None:
            assert told.effect > told.tellable > 0


def test_a_smaller_collapse_holds_in_direction_alone(tmp_path):
    store_made(tmp_path, PACKING, changed("causal_pinned_bos", text_in_excess=0.08))
    told = judged(tmp_path, "causal_pinned_bos: without")
    assert told[:3] == (Verdict.in_direction, Verdict.holds, Verdict.fails)
    assert "0.25 x" in told.reason


def test_a_collapse_the_other_way_does_not_hold(tmp_path):
    store_made(tmp_path, PACKING, changed("causal_pinned_bos", text_in_excess=0.4))
    assert verdicts(tmp_path, "causal_pinned_bos: without") == (Verdict.fails,) * 3


def test_one_seed_that_disagrees_is_enough_not_to_hold(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED, seeds=5)
    path = tmp_path / "runs" / "minutes" / "packing=causal_pinned_bos_seed=4.json"
    record = Record.from_json(path)
    path.write_bytes(replace(record, values=record.values | {"text/loss": 2.0}).to_json())
    told = judged(tmp_path, "causal_pinned_bos: without")
    assert told.verdict is Verdict.fails and "of seed 4" in told.reason


def test_every_seed_must_lie_above_every_seed(tmp_path):
    """Pairs of equal seeds would agree here."""
    store_made(tmp_path, PACKING, COLLAPSED)
    for seed in range(3):
        for own, value in (("baseline", 0.1 + 0.2 * seed), ("packing=causal_pinned_bos", 0.15)):
            path = tmp_path / "runs" / "minutes" / f"{own}_seed={seed}.json"
            record = Record.from_json(path)
            new = value if own == "baseline" else 0.65 + 0.3 * (seed - 1)
            path.write_bytes(
                replace(record, values=record.values | {"bos_text/excess": new}).to_json()
            )
    results = stored_results(PACKING, MINUTES, tmp_path)
    test = AtLeast(Of("causal_pinned_bos", "bos_text/excess"), Of("causal", "bos_text/excess"))
    pairs, every = (
        Claim(says="", direction=(replace(test, strict=True, every=each),))
        for each in (False, True)
    )
    assert judge(pairs, results, {}).verdict is Verdict.holds
    assert judge(every, results, {}).verdict is Verdict.fails


def test_two_seeds_decide_nothing(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED, seeds=2)
    results = stored_results(PACKING, MINUTES, tmp_path)
    for claim in PACKING.claims:
        told = judge(claim, results, {})
        assert told[:3] == (Verdict.undecided,) * 3 and "of the 3 seeds" in told.reason


def test_an_effect_that_noise_could_make_decides_nothing(tmp_path):
    small = changed("causal_pinned_bos", bos_text_in_excess=0.13, text_in_excess=0.1)
    store_made(tmp_path, PACKING, small, seeds=5)
    assert verdicts(tmp_path, "causal_pinned_bos: without")[1] is Verdict.holds
    # Eight seeds of the baseline that differ more than these five happened to.
    told = judged(tmp_path, "causal_pinned_bos: without", noise={"text/excess": (0.03, 8)})
    assert told[:3] == (Verdict.undecided,) * 3 and 0.02 < told.effect < told.tellable


def test_a_measure_that_a_run_lacks_decides_nothing(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED)
    path = tmp_path / "runs" / "minutes" / "packing=document_document_bos_seed=1.json"
    record = Record.from_json(path)
    del record.values["documents/inner_rate_030"]
    path.write_bytes(record.to_json())
    told = judged(tmp_path, "document_document_bos")
    assert told.verdict is Verdict.undecided and "documents/inner_rate_030" in told.reason


def test_an_order_that_still_changes_is_still_rising(tmp_path):
    ahead, behind = [0.0] * 11, [0.1] * 8 + [-0.1, -0.1, -0.1]
    curves = {
        "causal_pinned_bos": {"bos_text/excess": ahead},
        "causal": {"bos_text/excess": behind},
    }
    store_made(tmp_path, PACKING, COLLAPSED, curves)
    told = judged(tmp_path, "with its BOS")
    assert told[:3] == (Verdict.rising,) * 3 and "1,750" in told.reason
    # A change before the last third is over.
    early = [0.1] * 6 + [-0.1] * 5
    store_made(tmp_path, PACKING, COLLAPSED, curves | {"causal": {"bos_text/excess": early}})
    assert judged(tmp_path, "with its BOS").verdict is Verdict.holds
    pair = (Of("causal", "no/curve"), Of("causal_pinned_bos", "bos_text/excess"))
    assert unstable_from(pair, stored_results(PACKING, MINUTES, tmp_path)) is None
    assert STEPS[7] == 1750


def test_no_sink_at_all_isnt_sinks_at_document_starts(tmp_path):
    none = {"documents_in_start_rate_030": 0.0, "documents_in_inner_rate_030": 0.0}
    store_made(tmp_path, PACKING, changed("document_document_bos", **none))
    for seed in range(3):
        path = tmp_path / "runs" / "minutes" / f"packing=document_document_bos_seed={seed}.json"
        record = Record.from_json(path)
        zero = {f"documents/{which}_rate_030": 0.0 for which in ("start", "inner")}
        path.write_bytes(replace(record, values=record.values | zero).to_json())
    assert judged(tmp_path, "document_document_bos").verdict is Verdict.fails


def test_a_censored_run_has_no_emergence_and_says_nothing_of_layers(tmp_path):
    finding = FINDINGS["emergence"]
    store_made(tmp_path, finding, {"pinned": {"onset/censored": 1, "onset/onset_step": np.nan}})
    for says in ("pinned: a sink", "pinned: layers"):
        assert judged(tmp_path, says, finding=finding).direction is not Verdict.holds
    assert judged(tmp_path, "causal: a sink", finding=finding).verdict is Verdict.holds
    assert judged(tmp_path, "causal: layers", finding=finding).verdict is Verdict.holds


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text/excess": 0.01, "text/rate_030": 0.005, "text/hidden_ratio": 1.5}, "holds"),
        ({"text/excess": 0.01, "text/rate_030": 0.005, "text/hidden_ratio": 7.0}, "doesn't hold"),
    ],
)
def test_the_proxy_is_believed_only_if_the_norms_agree(tmp_path, values, expected):
    finding = FINDINGS["attention_ops"]
    store_made(tmp_path, finding, {"sigmoid": values | {"text/value_ratio": 0.9}})
    assert judged(tmp_path, "and the norms agree", finding=finding).verdict == expected


def test_what_cannot_be_decided_is_not(tmp_path):
    finding = FINDINGS["data_amount"]
    store_made(tmp_path, finding, {"all": {"natural/excess": 0.9}}, seeds=5)
    told = judged(tmp_path, "little", finding=finding)
    assert told.verdict is Verdict.undecided and "200M" in told.reason
    store_made(tmp_path, PACKING, COLLAPSED, budget="cpu")
    told = judged(tmp_path, "with its BOS", budget=BUDGETS["cpu"])
    assert told.verdict is Verdict.undecided and "machinery" in told.reason


def test_tests_say_what_they_test():
    left, right = Of("a", "x"), Of("b", "y")
    assert str(AtMost(left, right, times=0.25)) == "x of a <= 0.25 x y of b, in every seed"
    assert str(AtLeast(left, right, every=True, strict=True)).startswith("x of a > y of b, every")
    assert str(AtLeast(left, plus=0.2)) == "x of a >= 0.2, in every seed"
    assert AtMost(left, right, times=0.25).holds(0.25, 1.0)
    assert not AtMost(left, right, times=0.25, strict=True).holds(0.25, 1.0)
    assert Near(left, right, plus=0.05).holds(1.0, 1.04) and not Near(left, right, plus=0.05).holds(
        1, 2
    )


def test_quantiles_of_students_t():
    """Against the tables of any textbook."""
    for share, degrees, value in (
        *((0.975, 1, 12.706), (0.975, 4, 2.776), (0.975, 7, 2.365)),
        *((0.8, 7, 0.896), (0.975, 1000, 1.962), (0.5, 3, 0.0)),
    ):
        assert t_quantile(share, degrees) == pytest.approx(value, abs=1.5e-3)


def test_the_smallest_effect_is_found_four_times_in_five():
    n, sd = 5, 0.03
    effect = smallest_effect(sd, 2 * n - 2, n, n)
    draws = np.random.default_rng(0).normal(scale=sd, size=(20_000, 2, n))
    left, right = draws[:, 0] + effect, draws[:, 1]
    pooled = np.sqrt((left.var(1, ddof=1) + right.var(1, ddof=1)) / n)
    found = np.abs(left.mean(1) - right.mean(1)) / pooled > t_quantile(0.975, 2 * n - 2)
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_noise_is_the_larger_spread_of_the_baselines(tmp_path):
    finding = FINDINGS["noise"]
    store_made(tmp_path, finding, seeds=8)
    for seed in range(8):
        path = tmp_path / "runs" / "minutes" / f"packing=causal_pinned_bos_seed={seed}.json"
        record = Record.from_json(path)
        values = record.values | {"natural/excess": 0.1 * seed}
        path.write_bytes(replace(record, values=values).to_json())
    sd, count = stored_noise(MINUTES, tmp_path)["natural/excess"]
    assert (sd, count) == (pytest.approx(0.1 * np.std(range(8), ddof=1)), 8)
    told = outcome(stored_results(finding, MINUTES, tmp_path), {})
    smallest = told["spread"]["natural/excess"]["smallest_effect"]
    assert smallest["5"] == rounded(smallest_effect(sd, 8, 5, 5), 3) < smallest["3"]
    assert noise_of(stored_results(finding, MINUTES, tmp_path / "none")) == {}


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
    plans = [
        planned(FINDINGS[name], MINUTES, FINDINGS[name].arms[0], 3)
        for name in ("noise", "packing", "emergence", "attention_ops", "fixed_token")
    ]
    assert {(plan.pool, plan.slug) for plan in plans} == {("minutes", "baseline_seed=3")}
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
        for claim in finding.claims:
            assert set(claim.arms) <= arms and claim.direction
        assert {arm.context_of for arm in finding.arms_of(budget)} <= arms | {None}
        assert {panel.arm for panel in finding.panels} <= arms | {None}
    measures = {panel.measures[0] for panel in finding.panels if panel.kind != "points"}
    assert measures <= set(CURVES)


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
    for claim in stored_outcome(folder / f"{name}.json")["claims"]:
        assert claim["says"] in shown and claim["verdict"] in shown
    record = next((folder / "runs" / "minutes").iterdir())
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
    # Six more seeds of the same arms, five of which are emergence's too.
    store_made(folder, FINDINGS["noise"], seeds=8)
    paths = store_outcomes("noise", MINUTES, folder)
    assert {"emergence.json", "emergence.png", "noise.json"} <= {path.name for path in paths}
    assert stored_outcome(folder / "emergence.json")["seeds"]["causal"] == [0, 1, 2, 3, 4]
    assert check_stored(folder) == 2
    again = store_outcomes("noise", MINUTES, folder)
    assert {path.name for path in again} == {"findings.md"}, "nothing else has changed"


def test_the_page_has_what_is_stored_and_nothing_else(tmp_path):
    empty = page(tmp_path / "none")
    assert "##" not in empty and "%" not in empty


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pakcing"], "NAME must be among noise, packing"),
        ([], "NAME must be among"),
        (["noise", "--budget", "hours"], "--budget must be one of cpu, minutes, paper"),
        (["noise", "--jobs", "0"], "--jobs must be >= 1"),
        (["noise", "--show"], "must have stored results of noise"),
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
    assert "16/16" in after and "16 x 50 s" in after and "run noise first" not in after


def test_markdown_columns_are_aligned():
    assert markdown(["a", "b"], [["long", "1"]]) == ["| a    | b |", "| ---- | - |", "| long | 1 |"]
