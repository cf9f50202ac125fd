"""Runs of a campaign that share devices end in time, and use it."""

import random

import pytest

from train.findings.pace import NO_SLOWER, STARTING, Device, Pace, Turn


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def finish(pace: Pace, clock: Clock, waiting: list[float]) -> float:
    """Make the runs, which need so many seconds of a device each, as a campaign does, the devices
    being as fast as ``Device`` has it; returns when the last was done."""
    while True:
        while pace.free:
            slot = pace.slot()
            one = next((one for one in waiting if pace.in_time(slot, one)), None)
            if one is None:
                break
            waiting.remove(one)
            pace.begin(slot, one)
        running = [
            (max(0.0, turn.needs - turn.had) * max(len(device.turns), NO_SLOWER), slot)
            for device in pace.devices
            for slot, turn in device.turns.items()
        ]
        if not running:
            return clock.now
        passed, slot = min(running)
        clock.now += passed
        pace.end(slot)


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_any_length_end_in_time(seed):
    draw = random.Random(seed)
    runs = [draw.choice([10.0, 30.0, 120.0]) for _ in range(60)]
    slots, devices = draw.choice([(8, 1), (11, 1), (16, 2), (3, 4)])
    clock, deadline = Clock(), draw.uniform(100, 1500)
    pace = Pace(slots, devices, deadline, clock)
    waiting = list(runs)
    assert finish(pace, clock, waiting) <= deadline + 1e-6
    # A shortest one alone takes 30 s.
    made = sum(runs) - sum(waiting)
    assert not waiting or made > 0.5 * devices * min(1, slots / devices / NO_SLOWER) * deadline


def test_towards_the_end_fewer_are_begun():
    clock = Clock()
    pace = Pace(8, 1, 150.0, clock)
    waiting = [30.0] * 20
    begun = 0
    while pace.free and pace.in_time(pace.slot(), 30.0):
        pace.begin(pace.slot(), 30.0)
        begun += 1
    assert begun == 5
    for slot in range(5):
        clock.now = 150.0
        pace.end(slot)
    assert finish(pace, clock, waiting) == 150.0 and len(waiting) == 20


def test_a_long_run_gets_no_neighbours_that_would_make_it_late():
    device = Device()
    device.turns[0] = Turn(120.0)
    assert device.lasts(0.0) == pytest.approx(3 * 120)
    device.turns[1] = Turn(30.0)
    device.turns[2] = Turn(30.0)
    assert device.lasts(0.0) == pytest.approx(3 * 120)
    # Four at once for 30 s of each, then the long one alone.
    assert device.lasts(30.0) == pytest.approx(4 * 30 + 3 * 90)
    device.advance(60.0)
    assert [turn.had for turn in device.turns.values()] == [20.0, 20.0, 20.0]
    assert [turn.cost for turn in device.turns.values()] == [20.0, 20.0, 20.0]
    assert device.lasts(0.0) == pytest.approx(3 * 100)


def test_what_a_run_needs_is_known_by_the_token_and_from_what_was_done():
    clock = Clock()
    pace = Pace(2, 1, None, clock)
    assert pace.needs(1000, alone=90.0) == 90.0 / NO_SLOWER
    pace.begin(0, 30.0)
    clock.now = 60.0
    turn = pace.end(0)
    assert (turn.clock, turn.cost, turn.had) == (60.0, 60.0, 60.0 / NO_SLOWER)
    pace.learn(turn, 1000)
    assert pace.needs(4000, alone=1.0) == pytest.approx(80.0)
    assert pace.needs(4000, alone=1.0, before=30.0) == pytest.approx(50.0)
    # It must start again, whatever was done.
    assert pace.needs(4000, alone=1.0, before=1e6) == pytest.approx(80.0 * STARTING)


def test_nothing_begins_once_time_is_up():
    clock = Clock()
    pace = Pace(1, 1, 100.0, clock)
    clock.now = 200.0
    assert not pace.in_time(0, pace.needs(1, alone=30.0, before=1e6))


def test_slots_lie_on_the_devices_in_turn():
    pace = Pace(4, 2, None, Clock())
    order = []
    for _ in range(4):
        order.append(pace.slot())
        pace.begin(order[-1], 1.0)
    assert order == [0, 1, 2, 3] and [sorted(device.turns) for device in pace.devices] == [
        [0, 2],
        [1, 3],
    ]
    pace.end(2)
    pace.end(1)
    pace.end(0)
    assert pace.slot() == 0
