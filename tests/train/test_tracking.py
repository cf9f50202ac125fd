"""Which steps keep their weights."""

from train.tracking import TrackingConfig, checkpoint_steps


def test_log_spaced_then_regular_then_the_last():
    config = TrackingConfig(per_octave=2, dense_until=16, every=10)
    assert checkpoint_steps(config, 45) == [0, 1, 2, 3, 4, 6, 8, 11, 16, 20, 30, 40, 45]


def test_powers_of_two_are_always_among_them():
    for per_octave in range(1, 9):
        config = TrackingConfig(per_octave=per_octave, dense_until=4096)
        steps = checkpoint_steps(config, 5000)
        assert {2**power for power in range(13)} <= set(steps)
        assert steps == sorted(set(steps))


def test_a_short_run_keeps_its_first_and_last_step():
    assert checkpoint_steps(TrackingConfig(dense_until=0), 7) == [0, 7]
