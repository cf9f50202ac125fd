"""Onsets of synthetic curves whose onset is known."""

import numpy as np
import pandas as pd
import pytest

from kernels.errors import UserError
from train.onset import Moment, cumulative_lr, head_onsets, run_onset
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
    alpha = same([0.1, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    assert onset.onset == Moment(50, 50_000, 25.0)
    assert onset.spacing == Moment(10, 10_000, 5.0)
    assert (onset.low, onset.high) == (onset.onset, onset.onset), "equal heads leave no doubt"
    assert onset.censored_at is None and onset.censored_draws == 0
    assert (onset.sink_heads, onset.heads, onset.alpha_kind) == (4, 4, "probability")
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
    share = same([0.0] * 12 + [1.0] * 8)
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
    # Three of twelve heads sink; a draw often has fewer.
    alpha = np.full((10, 12), BASELINE)
    alpha[4:, :3] = 0.9
    onset = run_onset(curve(STEPS, alpha), constant_lr(100))
    # P(Binomial(12, 1/4) < 3) = 0.39; the standard error of 200 draws is 0.034.
    assert 0.28 < onset.censored_draws < 0.50
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
