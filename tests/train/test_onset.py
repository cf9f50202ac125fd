"""Onsets of synthetic curves whose onset is known."""

import numpy as np
import pandas as pd
import pytest

from kernels.errors import UserError
from train.config import compose
from train.onset import Moment, cumulative_lr, head_onsets, run_onset, scheduled_rates
from train.schedules import ConstantSchedule

TOKENS = 1000
BASELINE = 0.1


def curve(steps, alpha_SN, share_SN=None, kind="probability") -> pd.DataFrame:
    """The sinks table of a one-layer run; shares of samples over 0.3 are 0 or 1 unless given."""
    alpha_SN = np.asarray(alpha_SN, dtype=float)
    share_SN = (alpha_SN > 0.3) if share_SN is None else np.asarray(share_SN)
    rows = [
        {
            "step": step,
            "tokens": TOKENS * step,
            "layer": 0,
            "head": head,
            "key": "first",
            "position": -1,
            "count": 20,
            "alpha": alpha_SN[record, head],
            "baseline": BASELINE,
            "over_030": round(20 * float(share_SN[record, head])),
            "alpha_kind": kind,
        }
        for record, step in enumerate(steps)
        for head in range(alpha_SN.shape[1])
    ]
    # Another key, which must not be looked at.
    other = [row | {"key": "position", "position": 0, "alpha": 0.9, "over_030": 20} for row in rows]
    return pd.DataFrame(rows + other)


def constant_lr(last: int, rate: float = 0.5) -> pd.DataFrame:
    return pd.DataFrame({"step": [0, 1, last], "train/lr": [np.nan, rate, rate]})


def same(values, heads=4) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=float)[:, None], heads, axis=1)


STEPS = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_a_step_is_found_in_every_unit():
    alpha = same([0.1, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], heads=12)
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset == Moment(50, 50_000, 25.0)
    assert onset.spacing == Moment(10, 10_000, 5.0)
    assert (onset.low, onset.high) == (onset.onset, onset.onset), "equal heads leave no doubt"
    assert onset.censored_at is None and onset.censored_draws == 0
    assert (onset.sink_heads, onset.heads, onset.alpha_kind) == (12, 12, "probability")
    assert onset.final_excess == pytest.approx(0.5)


def test_the_run_is_at_half_its_excess_and_a_head_at_half_its_samples():
    # Half of the final excess of 0.8 is 0.4: alpha 0.5. Ties count.
    alpha = same([0.1, 0.2, 0.31, 0.45, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9])
    share = same([0.0, 0.1, 0.45, 0.5, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0])
    table = curve(STEPS, alpha, share)
    assert run_onset(table, constant_lr(100)).onset.step == 50
    assert {head.onset.step for head in head_onsets(table, constant_lr(100))} == {40}


def test_the_final_mass_is_the_last_tenth():
    # 20 records: the last two average 0.4 excess, half of which is reached at 0.3, record 10.
    values = [0.1] * 9 + [0.29, 0.3, 0.31] + [0.4] * 6 + [0.3, 0.7]
    steps = range(5, 105, 5)
    share = same([0.0] * 9 + [1.0] * 11)
    assert run_onset(curve(steps, same(values), share), constant_lr(100)).onset.step == 55


def test_two_heads_are_not_enough():
    alpha = same([0.1] * 5 + [0.6] * 5)
    alpha[:, 2:] = BASELINE
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert (onset.onset, onset.spacing, onset.low, onset.high) == (None,) * 4
    assert onset.censored_at == Moment(100, 100_000, 50.0)
    assert onset.sink_heads == 2 and onset.final_excess == pytest.approx(0.25)
    alpha[:, 2] = 0.6
    assert run_onset(curve(STEPS, alpha), constant_lr(100)).onset is not None


def test_half_of_the_mass_is_not_enough_before_three_heads_are_sinks():
    # Half of the final excess is there at step 20, but no head is above 0.3 before step 90.
    alpha = same([0.1] + [0.29] * 7 + [0.31] * 2, heads=12)
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset == onset.low == onset.high == Moment(90, 90_000, 45.0)
    assert onset.spacing.step == 10 and onset.censored_draws == 0


def test_one_strong_head_is_not_a_run():
    alpha = np.full((10, 4), BASELINE)
    alpha[1:, 0] = 0.95
    alpha[8:, 1:3] = 0.35
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset.step == 90 and onset.sink_heads == 3
    # The third head decides, not the last.
    alpha[9, 3] = 0.35
    assert run_onset(curve(STEPS, alpha), constant_lr(100)).onset.step == 90


def test_three_heads_are_not_enough_before_half_of_the_mass():
    alpha = np.full((10, 12), BASELINE)
    alpha[1:, :3] = 0.4
    alpha[6:] = 0.9
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset.step == 70 and onset.sink_heads == 12


def test_a_model_of_two_heads_is_censored():
    onset = run_onset(curve(STEPS, same([0.1] * 5 + [0.6] * 5, heads=2)), constant_lr(100))
    assert onset.censored_at.step == 100 and (onset.sink_heads, onset.censored_draws) == (2, 1)


def test_a_curve_that_falls_back_has_no_onset_and_one_that_comes_again_the_second():
    gone = same([0.1, 0.1, 0.8, 0.8, 0.8, 0.8, 0.1, 0.1, 0.1, 0.1])
    onset = run_onset(curve(STEPS, gone), constant_lr(100))
    assert onset.onset is None and onset.censored_at.step == 100 and onset.sink_heads == 0
    again = same([0.1, 0.8, 0.8, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8])
    assert run_onset(curve(STEPS, again), constant_lr(100)).onset.step == 70
    assert {head.onset.step for head in head_onsets(curve(STEPS, again), constant_lr(100))} == {70}


def test_irregular_records_in_any_order():
    # As a run stopped at step 33 and resumed leaves them; the first record's spacing is its step.
    steps = [10, 20, 30, 33, 40, 80, 81]
    alpha = same([0.1, 0.1, 0.1, 0.1, 0.1, 0.6, 0.6])
    table = curve(steps, alpha).sample(frac=1, random_state=0)
    onset = run_onset(table, constant_lr(81))
    assert (onset.onset.step, onset.spacing.step, onset.spacing.tokens) == (80, 40, 40_000)
    early = run_onset(curve(steps, same([0.6] * 7)), constant_lr(81))
    assert early.onset == early.spacing == Moment(10, 10_000, 5.0)


def test_heads_without_a_record_are_left_out_of_means_and_onsets():
    alpha = same([0.1] * 5 + [0.6] * 5)
    table = curve(STEPS, alpha)
    hidden = (table["head"] == 3) & (table["step"] >= 70)
    onset = run_onset(table[~hidden], constant_lr(100))
    assert onset.onset.step == 60 and onset.sink_heads == 4 and onset.heads == 4
    by_head = head_onsets(table[~hidden], constant_lr(100))
    assert by_head[3].onset.step == 60 and (by_head[3].layer, by_head[3].head) == (0, 3)
    only_late = (table["head"] == 3) & (table["step"] < 70)
    assert head_onsets(table[~only_late], constant_lr(100))[3].onset.step == 70


def test_the_interval_holds_what_other_heads_would_have_given():
    # Head n rises at record n: a run of other heads has another onset.
    alpha = np.where(np.arange(10)[:, None] >= np.arange(8)[None], 0.9, 0.1)
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset.step == 40, "half of eight heads"
    assert 10 <= onset.low.step < 40 < onset.high.step <= 80
    assert onset == run_onset(curve(STEPS, alpha), constant_lr(100)), "the same every time"
    other = run_onset(curve(STEPS, alpha), constant_lr(100), draws=50, seed=1)
    assert other.onset == onset.onset


def test_an_interval_of_which_some_draws_are_censored_is_open():
    # Three of twelve heads sink; a draw seldom has all of them, and one three times isn't three.
    alpha = np.full((10, 12), BASELINE)
    alpha[4:, :3] = 0.9
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    # P(one of three isn't among 12 draws of 12) = 3 (11/12)^12 - 3 (10/12)^12 + (9/12)^12 = 0.75;
    # the standard error of 200 draws is 0.031.
    assert 0.65 < onset.censored_draws < 0.85
    assert onset.onset.step == onset.low.step == 50 and onset.high is None


def test_what_a_table_without_rates_or_first_keys_gives():
    table = curve(STEPS, same([0.6] * 10), kind="proxy")
    onset = run_onset(table, pd.DataFrame({"step": [0, 100]}))
    assert onset.onset.step == 10 and np.isnan(onset.onset.lr_sum)
    assert onset.alpha_kind == "proxy"
    with pytest.raises(UserError, match="sinks must have records of the first key"):
        run_onset(table[table["key"] == "position"], constant_lr(100))


def test_rates_add_up_as_the_schedule_gave_them():
    schedule = ConstantSchedule(warmup_steps=20)
    true = np.array([0.1 * schedule.factor(step, 100) for step in range(100)])
    logged = np.arange(5, 101, 5)
    metrics = pd.DataFrame({"step": logged, "train/lr": true[logged - 1]})
    steps = np.array([0, 3, 20, 57, 100])
    expected = [true[:step].sum() for step in steps]
    np.testing.assert_allclose(cumulative_lr(metrics, steps), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warmup_stable_decay"])
def test_scheduled_rates_add_up_exactly(schedule):
    overrides = [f"schedule={schedule}", "schedule.warmup_steps=10", "trainer.max_steps=40"]
    config, _ = compose(["debug=cpu", "optimizer.lr=1.0", *overrides])
    rates = scheduled_rates(config, 30)
    np.testing.assert_allclose(cumulative_lr(rates, np.array([0, 1, 10])), [0, 0.1, 5.5])
    after = sum(config.schedule.factor(step, 40) for step in range(10, 30))
    assert cumulative_lr(rates, np.array([30]))[0] == pytest.approx(5.5 + after)
