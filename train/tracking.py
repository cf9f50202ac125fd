"""What a run measures, when, and at which steps it keeps its weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kernels.attention import StatisticsLevel
from kernels.errors import require


@dataclass(kw_only=True)
class TrackingConfig:
    """Statistics, logging and checkpoints, in updates ("steps")."""

    statistics: StatisticsLevel = StatisticsLevel.basic
    """Attention statistics taken in every training step: off, basic, or full (adds the entropy)."""
    sinks_every: int = 10
    """Steps between two records of the sink statistics, summed over all rows in between."""
    log_every: int = 10
    """Steps between two records of loss and throughput."""
    validate_every: int = 100
    """Steps between two validations; the first and the last step have one too."""
    positions: int = 16
    """Leading key positions whose attention is recorded by layer and head."""
    per_octave: int = 4
    """Kept checkpoints for each doubling of the step, up to dense_until."""
    dense_until: int = 1024
    """Last step of the log-spaced schedule of checkpoints."""
    every: int = 1000
    """Steps between kept checkpoints after dense_until."""
    last_every: int = 200
    """Steps between two writes of last.ckpt, the state that a resume starts from."""
    canonical_rows: int = 64
    """Held-out rows of the canonical loss."""
    probe_rows: int = 100
    """Held-out 64-token prompts of the sink probes."""
    probes: list[str] = field(default_factory=list)
    """Probes to run at validations, logged as probe/<name>/...: names in train.probes.PROBES."""
    figures: bool = True
    """Draw figures/ at the end of the run."""

    def __post_init__(self):
        for name in (
            "sinks_every",
            "log_every",
            "validate_every",
            "positions",
            "per_octave",
            "every",
            "last_every",
            "canonical_rows",
            "probe_rows",
        ):
            value = getattr(self, name)
            require(value >= 1, f"tracking.{name}", "must be >= 1", value)
        if self.probes:
            # Imported late, as they import Lightning, which --help and typos need not wait for.
            from train.probes import PROBES
        for name in self.probes:
            require(name in PROBES, "tracking.probes", f"must be among {', '.join(PROBES)}", name)
        require(self.dense_until >= 0, "tracking.dense_until", "must be >= 0", self.dense_until)


def checkpoint_steps(config: TrackingConfig, max_steps: int) -> list[int]:
    """The steps whose weights are kept, ascending, ``max_steps`` included.

    Step 0, then ``per_octave`` a doubling, 2^(i / per_octave) rounded, up to ``dense_until``, then
    every multiple of ``every``. Powers of two up to ``dense_until`` are always among them.
    """

    def log_spaced() -> Iterator[int]:
        index = 0
        while (step := round(2 ** (index / config.per_octave))) <= config.dense_until:
            yield step
            index += 1

    later = range(config.every, max_steps, config.every)
    steps = {0, *log_spaced(), *(step for step in later if step > config.dense_until), max_steps}
    return sorted(step for step in steps if step <= max_steps)
