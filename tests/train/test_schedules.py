"""Learning-rate schedules against values worked out by hand."""

import pytest

from kernels.errors import UserError
from train.schedules import (
    SCHEDULES,
    ConstantSchedule,
    CosineSchedule,
    WarmupStableDecaySchedule,
    check_schedule,
)


@pytest.mark.parametrize("kind", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_warmup_is_linear_and_reaches_the_peak(kind):
    schedule = kind(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4, 100) == pytest.approx(1.0)


def test_constant_never_decays():
    assert ConstantSchedule(warmup_steps=0).factor(10**6, 10) == 1.0


def test_cosine_goes_halfway_at_half_time_and_ends_at_its_ratio():
    schedule = CosineSchedule(warmup_steps=10, final_ratio=0.2)
    assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert schedule.factor(110, 110) == pytest.approx(0.2)


def test_warmup_stable_decay_is_flat_then_linear_to_zero():
    schedule = WarmupStableDecaySchedule(warmup_steps=0, decay_share=0.25)
    factors = [schedule.factor(step, 8) for step in range(9)]
    assert factors == [1, 1, 1, 1, 1, 1, 1, 0.5, 0]


def test_a_schedule_that_ends_before_the_run_is_refused():
    with pytest.raises(UserError, match=r"schedule.total_steps must be >= trainer.max_steps"):
        check_schedule(CosineSchedule(total_steps=10), 20)
    assert check_schedule(ConstantSchedule(total_steps=10), 20) == 10
    assert check_schedule(CosineSchedule(), 20) == 20
