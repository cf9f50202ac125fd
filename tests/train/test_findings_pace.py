"""Runs of a campaign that share devices end in time, and use it."""

import random

import pytest

from train.findings.pace import NO_SLOWER, OVERDUE, STARTING, Device, Pace, Size, Turn


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def size(seconds: float, guess: float | None = None) -> Size:
    """Of a run that needs so many seconds of a device, a token each; guess: the first estimate."""
    return Size("a preset", int(seconds), alone=NO_SLOWER * (guess or seconds))


def finish(pace: Pace, clock: Clock, waiting: list[Size]) -> float:
    """Make the runs as a campaign does, on devices as fast as ``Device`` has it; returns when the
    last was done."""
    while True:
        while begun := next(
            ((one, slot) for one in waiting for slot in pace.slots() if pace.in_time(slot, one)),
            None,
        ):
            waiting.remove(begun[0])
            pace.begin(begun[1], begun[0])
        running = [
            (max(0.0, turn.size.tokens - turn.had) * max(len(device.turns), NO_SLOWER), slot)
            for device in pace.devices
            for slot, turn in device.turns.items()
        ]
        if not running:
            return clock.now
        passed, slot = min(running)
        clock.now += passed
        pace.learn(pace.end(slot))


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_any_length_end_in_time(seed):
    draw = random.Random(seed)
    runs = [size(draw.choice([10, 30, 120])) for _ in range(60)]
    slots, devices = draw.choice([(8, 1), (11, 1), (16, 2), (3, 4)])
    clock, deadline = Clock(), draw.uniform(100, 1500)
    pace = Pace(slots, devices, deadline, clock)
    waiting = list(runs)
    assert finish(pace, clock, waiting) <= deadline + 1e-6
    # A shortest one alone takes 30 s.
    made = sum(one.tokens for one in runs) - sum(one.tokens for one in waiting)
    assert not waiting or made > 0.5 * devices * min(1, slots / devices / NO_SLOWER) * deadline


def test_towards_the_end_fewer_are_begun():
    clock = Clock()
    pace = Pace(8, 1, 150.0, clock)
    waiting = [size(30)] * 20
    assert finish(pace, clock, waiting) == 150.0 and len(waiting) == 15


def test_a_long_run_gets_no_neighbours_that_would_make_it_late():
    device, needs = Device(), Pace(1, 1, None, Clock()).needs
    device.turns[0] = Turn(size(120))
    assert device.lasts(needs, size(0)) == pytest.approx(3 * 120)
    device.turns[1] = Turn(size(30))
    device.turns[2] = Turn(size(30))
    # Four at once for 30 s of each, then the long one alone.
    assert device.lasts(needs, size(30)) == pytest.approx(4 * 30 + 3 * 90)
    device.advance(60.0)
    assert [turn.had for turn in device.turns.values()] == [20.0, 20.0, 20.0]
    assert [turn.cost for turn in device.turns.values()] == [20.0, 20.0, 20.0]
    assert device.lasts(needs, size(10)) == pytest.approx(4 * 10 + 3 * 90)


def test_what_a_run_needs_is_known_by_the_token_of_its_preset_and_from_what_was_done():
    clock = Clock()
    pace = Pace(2, 1, None, clock)
    one = Size("minutes", 1000, alone=90.0)
    assert pace.needs(one) == 90.0 / NO_SLOWER
    pace.begin(0, one)
    clock.now = 60.0
    turn = pace.end(0)
    assert (turn.clock, turn.cost, turn.had) == (60.0, 60.0, 60.0 / NO_SLOWER)
    pace.learn(turn)
    assert pace.needs(Size("minutes", 4000, alone=1.0)) == pytest.approx(80.0)
    assert pace.needs(Size("another", 4000, alone=3.0)) == 3.0 / NO_SLOWER
    # It must start again, whatever was done.
    for before, left in ((1.0, 80.0), (60.0, 20 + 80 * STARTING), (1e6, 80 * STARTING)):
        assert pace.needs(Size("minutes", 4000, 1.0, before)) == pytest.approx(left)


def test_runs_that_take_longer_than_was_thought_leave_less_time_for_others():
    clock = Clock()
    pace = Pace(4, 1, 200.0, clock)
    for slot in range(3):
        pace.begin(slot, size(50, guess=20))
    clock.now = 100.0
    assert pace.in_time(3, size(1))
    # The others are overdue, and so they have something left.
    assert pace.devices[0].lasts(pace.needs, size(1)) == pytest.approx(
        4 * 1 + 3 * (20 * OVERDUE - 1)
    )
    clock.now = 150.0
    pace.learn(pace.end(0))
    # The others are known to need 50, of which they have had 50.
    assert not pace.in_time(0, size(50, guess=20))


def test_nothing_begins_once_time_is_up():
    clock = Clock()
    pace = Pace(1, 1, 100.0, clock)
    clock.now = 200.0
    assert not pace.in_time(0, Size("a preset", 1, alone=30.0, before=1e6))


def test_slots_lie_on_the_devices_in_turn():
    pace = Pace(4, 2, None, Clock())
    for slots in ([0, 1], [1, 2], [2, 3], [3]):
        assert pace.slots() == slots
        pace.begin(slots[0], size(1))
    assert [sorted(device.turns) for device in pace.devices] == [[0, 2], [1, 3]]
    assert pace.slots() == []
    for slot in (2, 1, 0):
        pace.end(slot)
    # One on the device that has none, then on the other.
    assert pace.slots() == [0, 1]
