"""Which runs a bench makes: presets, and what of a run's settings a bench changes."""

from pathlib import Path

from kernels.errors import require
from train.config import RunConfig, compose

PRESETS = {
    "gu60m": ["experiment=gu60m"],
    "barbero120m": ["experiment=barbero120m"],
    "1b": ["experiment=gu_1b"],
    # At the default run's own rate, 4e-3, two plain loops whose weights differ by 1e-7 are 0.1 nats
    # apart in step 36 (docs/speed.md): no losses could be compared.
    "default": ["optimizer.lr=4e-4"],
    "cpu": ["debug=cpu", "optimizer.lr=4e-4", "tracking.log_every=10", "tracking.sinks_every=10"],
}
"""Settings of ``python -m train`` by preset; ``default`` is the run without any, ``cpu`` one
that is small enough to be timed in seconds."""

MICRO_BATCHES = 2
"""Of a step, unless ``packing.batch_tokens`` is given: enough that accumulation is paid for."""

NEVER = 10**6
"""Steps, more than a bench makes."""

OUTSIDE_TRAINING = [
    f"trainer.max_steps={NEVER}",
    f"tracking.validate_every={NEVER}",
    f"tracking.every={NEVER}",
    f"tracking.last_every={NEVER}",
    "tracking.dense_until=0",
    "tracking.probes=[]",
    "tracking.figures=false",
    "trainer.progress=false",
    # Its runs are one a process, and what it sends it sends from a process of its own.
    "logger.wandb=disabled",
]
"""Validation, checkpoints and display are left to others; records are made as the preset says."""


def bench_overrides(preset: str, overrides: list[str], rows: int | None = None) -> list[str]:
    """A preset's settings as the bench changes them, all as overrides of ``python -m train``.

    The plain peer's attention is causal, so rows are packed ``causal`` unless ``overrides`` say
    otherwise. rows: of a micro-batch; None is the preset's. Raises ``UserError`` for an unknown
    preset and for what the settings refuse.
    """
    known = preset in PRESETS
    require(known, "--presets", f"must be among {', '.join(PRESETS)}", preset)
    packing = [] if any(o.startswith("packing=") for o in overrides) else ["packing=causal"]
    chosen = [*PRESETS[preset], *packing, *overrides, *OUTSIDE_TRAINING]
    packed = compose(chosen)[0].packing
    rows = rows or packed.micro_batch_rows or packed.batch_rows
    chosen.append(f"packing.micro_batch_rows={rows}")
    if not any(o.startswith("packing.batch_tokens=") for o in overrides):
        chosen.append(f"packing.batch_tokens={MICRO_BATCHES * rows * packed.context}")
    return chosen


def run_in(folder: Path, overrides: list[str]) -> tuple[RunConfig, dict]:
    """The settings of a run in a folder, typed and plain."""
    return compose([*overrides, f"run_dir='{folder}'"])
