"""Learning-rate schedules, picked by ``schedule=NAME``: a factor on the peak rate by update.

Every schedule rises linearly over ``warmup_steps``: update n (from 0) has factor (n + 1) / warmup.
A rate that decays confounds checkpoints of different age, so experiments that compare checkpoints
over time use ``constant`` or ``warmup_stable_decay``.
"""

import math
from dataclasses import dataclass

from kernels.errors import UserError, require


@dataclass(kw_only=True)
class ScheduleConfig:
    """What every schedule has."""

    warmup_steps: int = 100
    """Updates over which the rate rises linearly to its peak; 0 = none."""
    total_steps: int | None = None
    """Updates after which the schedule has ended; null = trainer.max_steps."""

    def __post_init__(self):
        require(self.warmup_steps >= 0, "schedule.warmup_steps", "must be >= 0", self.warmup_steps)
        require(
            self.total_steps is None or self.total_steps >= 1,
            "schedule.total_steps",
            "must be >= 1 or null",
            self.total_steps,
        )

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the peak rate for the update number ``step`` (from 0) of ``total_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, total_steps)

    def after_warmup(self, step: int, total_steps: int) -> float:
        raise AssertionError("a schedule says what follows the warm-up")


@dataclass(kw_only=True)
class ConstantSchedule(ScheduleConfig):
    """The peak rate from the end of the warm-up on."""

    def after_warmup(self, step: int, total_steps: int) -> float:
        return 1.0


@dataclass(kw_only=True)
class CosineSchedule(ScheduleConfig):
    """Half a cosine from the peak down to ``final_ratio`` of it."""

    final_ratio: float = 0.1
    """Share of the peak rate at the last update."""

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.final_ratio <= 1,
            "schedule.final_ratio",
            "must be in [0, 1]",
            self.final_ratio,
        )

    def after_warmup(self, step: int, total_steps: int) -> float:
        span = max(1, total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(kw_only=True)
class WarmupStableDecaySchedule(ScheduleConfig):
    """The peak rate, then a linear descent to zero over the last ``decay_share`` of the updates."""

    decay_share: float = 0.2
    """Share of all updates that the descent takes."""

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < self.decay_share <= 1,
            "schedule.decay_share",
            "must be in (0, 1]",
            self.decay_share,
        )

    def after_warmup(self, step: int, total_steps: int) -> float:
        decay_steps = max(1, round(self.decay_share * total_steps))
        return min(1.0, max(0.0, (total_steps - step) / decay_steps))


SCHEDULES = {
    "constant": ConstantSchedule,
    "cosine": CosineSchedule,
    "warmup_stable_decay": WarmupStableDecaySchedule,
}


def check_schedule(schedule: ScheduleConfig, max_steps: int) -> int:
    """The schedule's length in updates. Raises UserError where it doesn't cover the run."""
    total_steps = schedule.total_steps or max_steps
    if total_steps < max_steps and not isinstance(schedule, ConstantSchedule):
        raise UserError(
            f"schedule.total_steps must be >= trainer.max_steps ({max_steps}), got {total_steps}"
        )
    return total_steps
