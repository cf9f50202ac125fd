"""Verdicts on stored results whose effects are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.made_results import COLLAPSED, PACKING, STEPS, fewer_keys, store_made
from train.findings import FINDINGS
from train.findings.base import AtLeast, AtMost, Claim, Near, Of
from train.findings.budgets import BUDGETS
from train.findings.measures import Record, rounded
from train.findings.page import stored_noise
from train.findings.statistics import smallest_effect, t_quantile
from train.findings.store import stored_results
from train.findings.table import outcome
from train.findings.verdicts import Verdict, judge, noise_of, unstable_from

MINUTES = BUDGETS["minutes"]


def judged(folder: Path, says: str, noise=None, finding=PACKING, budget=MINUTES):
    (claim,) = (claim for claim in finding.claims_of(budget.name) if says in claim.says)
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
        no_number = Verdict.undecided if claim.magnitude else Verdict.no_number
        assert told[:3] == (Verdict.undecided, Verdict.undecided, no_number)
        assert "of the 3 seeds" in told.reason


def test_an_effect_that_noise_could_make_decides_nothing(tmp_path):
    small = changed("causal_pinned_bos", bos_text_in_excess=0.13, text_in_excess=0.1)
    store_made(tmp_path, PACKING, small, seeds=5)
    assert verdicts(tmp_path, "causal_pinned_bos: without")[1] is Verdict.holds
    # Eight seeds of the baseline that differ more than these five happened to.
    told = judged(tmp_path, "causal_pinned_bos: without", noise={"text/excess": (0.03, 8)})
    assert told[:3] == (Verdict.undecided,) * 3 and 0.02 < told.effect < told.tellable
    assert told.reason.startswith("effect 0.0295 in bos_text/excess - text/excess, smallest")


def drop_measure(folder: Path, seed: int) -> None:
    """As of a run from before the measure was taken."""
    path = folder / "runs" / "minutes" / f"packing=document_document_bos_seed={seed}.json"
    record = Record.from_json(path)
    del record.values["documents/inner_rate_030"]
    path.write_bytes(record.to_json())


def test_runs_from_before_a_measure_was_taken_decide_nothing(tmp_path):
    store_made(tmp_path, PACKING, COLLAPSED, seeds=4)
    drop_measure(tmp_path, 1)
    told = judged(tmp_path, "document_document_bos has its sinks")
    assert told.verdict is Verdict.holds and told.seeds == 3
    drop_measure(tmp_path, 2)
    told = judged(tmp_path, "document_document_bos has its sinks")
    assert told.verdict is Verdict.undecided and told.seeds == 2
    assert "not every run has documents/inner_rate_030" in told.reason


def test_a_measure_that_is_no_number_decides_nothing(tmp_path):
    """Unlike one that wasn't taken: leaving the run out would leave out what it says."""
    odd = {"documents/inner_rate_030": np.nan}
    store_made(tmp_path, PACKING, COLLAPSED | {"document_document_bos": odd}, seeds=4)
    told = judged(tmp_path, "document_document_bos has its sinks")
    assert told.verdict is Verdict.undecided and told.seeds == 4
    assert "documents/inner_rate_030" in told.reason


def test_an_order_that_still_changes_is_still_rising(tmp_path):
    ahead, behind = [0.0] * 11, [0.1] * 8 + [-0.1, -0.1, -0.1]
    curves = {
        "causal_pinned_bos": {"bos_text/excess": ahead},
        "causal": {"bos_text/excess": behind},
    }
    store_made(tmp_path, PACKING, COLLAPSED, curves)
    told = judged(tmp_path, "more than causal,")
    assert told[:3] == (Verdict.rising,) * 3 and "1,750" in told.reason
    # A change before the last third is over.
    early = [0.1] * 6 + [-0.1] * 5
    store_made(tmp_path, PACKING, COLLAPSED, curves | {"causal": {"bos_text/excess": early}})
    assert judged(tmp_path, "more than causal,").verdict is Verdict.holds
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
    told = judged(tmp_path, "pinned: a sink", finding=finding)
    assert told.verdict is Verdict.fails and "onset/censored" in told.reason
    assert judged(tmp_path, "pinned: layers", finding=finding).verdict is Verdict.undecided
    assert judged(tmp_path, "causal: a sink", finding=finding).verdict is Verdict.holds
    assert judged(tmp_path, "causal: layers", finding=finding).verdict is Verdict.holds


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"excess": 0.01, "rate_030": 0.005, "hidden_ratio": 1.5}, "holds"),
        ({"excess": 0.01, "rate_030": 0.005, "hidden_ratio": 7.0}, "doesn't hold"),
    ],
)
def test_the_proxy_is_believed_only_if_the_norms_agree(tmp_path, values, expected):
    finding = FINDINGS["attention_ops"]
    measured = {f"natural/{name}": value for name, value in values.items()}
    store_made(tmp_path, finding, {"sigmoid": measured | {"natural/value_ratio": 0.9}})
    assert (
        judged(tmp_path, "sigmoid, without normalisation, has", finding=finding).verdict == expected
    )


def test_the_order_of_written_positions_is_that_of_training_rows(tmp_path):
    finding = FINDINGS["fixed_token"]
    values = {"written/rate_030_at_1": 0.6, "written/rate_030_beside_1": 0.0}
    curves = {"rows/mass_at_1": [0.0] * 9 + [0.5] * 2, "rows/mass_beside_1": [0.1] * 11}
    store_made(tmp_path, finding, {"fixed_2": values}, {"fixed_2": curves})
    told = judged(tmp_path, "fixed at position 2", finding=finding)
    assert told.verdict is Verdict.rising and "2,000" in told.reason
    store_made(tmp_path, finding, {"fixed_2": values})
    assert judged(tmp_path, "fixed at position 2", finding=finding).verdict is Verdict.holds
    # The noise finding writes nothing: its prompts of text stand for these.
    noise = {"text/rate_030_at_1": (0.3, 8)}
    told = judged(tmp_path, "fixed at position 2", finding=finding, noise=noise)
    assert told.verdict is Verdict.undecided


def test_the_pinned_model_is_held_against_every_unpinned_one(tmp_path):
    """Also against the model that doesn't know the BOS, on prompts without it."""
    store_made(tmp_path, PACKING, changed("causal", text_in_excess=0.3))
    assert judged(tmp_path, "more than causal,").verdict is Verdict.fails
    assert judged(tmp_path, "more than causal_document_bos").verdict is Verdict.holds
    store_made(tmp_path, PACKING, changed("causal_document_bos", bos_text_in_excess=0.3))
    assert judged(tmp_path, "more than causal_document_bos").verdict is Verdict.fails
    store_made(tmp_path, PACKING, changed("causal_document_bos", text_in_loss=3.2))
    prompts = "causal_document_bos doesn't care whether a BOS is there, on 64-token prompts"
    assert judged(tmp_path, prompts).verdict is Verdict.fails
    # On rows it may lose 0.05, and a quarter of what the pinned model does: 0.1 here.
    rows = "causal_document_bos doesn't care whether a BOS is there, on rows"
    for loss, verdict in ((2.5, Verdict.holds), (2.54, Verdict.in_direction), (2.7, Verdict.fails)):
        told = changed("causal_document_bos", row_text_in_loss=loss)
        store_made(tmp_path, PACKING, told)
        assert judged(tmp_path, rows).verdict is verdict


def test_what_cannot_be_decided_is_not(tmp_path):
    finding = FINDINGS["data_amount"]
    store_made(tmp_path, finding, {"all": {"natural/excess": 0.9}}, seeds=5)
    told = judged(tmp_path, "little", finding=finding)
    assert told.verdict is Verdict.undecided and "200M" in told.reason
    store_made(tmp_path, PACKING, COLLAPSED, budget="cpu")
    told = judged(tmp_path, "more than causal,", budget=BUDGETS["cpu"])
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


def test_a_finding_with_an_experiment_of_its_own_has_its_own_noise(tmp_path):
    finding = FINDINGS["backcopy"]
    gone = {"natural/excess": -0.05, "natural/rate_030": 0.0, "natural/null_rate_030": 1.0}
    store_made(tmp_path, finding, {"k_bias": gone})
    # The baseline's, which would hide any effect.
    told = judged(
        tmp_path, "k_bias: the slot", noise={"natural/excess": (10.0, 8)}, finding=finding
    )
    assert told.verdict is Verdict.holds and told.tellable < 0.15


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
    # With its BOS alone, once it is known that the model was trained with one.
    assert {"text/mass", "bos_text/mass"} <= set(stored_noise(MINUTES, tmp_path))
    results = stored_results(finding, MINUTES, tmp_path)
    for arm, with_bos in (("causal", False), ("pinned", True)):
        for seed, record in results.records[arm].items():
            made_by = record.made_by | {"trained_with_bos": with_bos}
            moved = 0.1 * seed * (with_bos is False)
            values = record.values | {"bos_text/mass": 0.2 + moved, "text/mass": 0.3 - moved}
            # A known delimiter and whole rows go with the text, or with the BOS, as prompts do.
            values |= {"eos_text/mass": 0.3 + 0.2 * seed * with_bos, "row_bos_text/loss": moved}
            results.records[arm][seed] = replace(record, made_by=made_by, values=values)
    for measure in ("bos_text/mass", "eos_text/mass", "row_bos_text/loss"):
        assert noise_of(results)[measure][0] == pytest.approx(0, abs=1e-9)
    assert noise_of(results)["text/mass"][0] == pytest.approx(0.1 * np.std(range(8), ddof=1))
    told = outcome(stored_results(finding, MINUTES, tmp_path), {})
    smallest = told["spread"]["natural/excess"]["smallest_effect"]
    assert smallest["5"] == rounded(smallest_effect(sd, 8, 5, 5), 3) < smallest["3"]
    assert noise_of(stored_results(finding, MINUTES, tmp_path / "none")) == {}
