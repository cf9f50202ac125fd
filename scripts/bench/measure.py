"""The bench of one preset: agreement, rounds of turns, split."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kernels.attention import StatisticsLevel
from kernels.bench.timing import Clock, CudaClock, HostClock, Timing, interleaved
from kernels.errors import UserError, require
from scripts.bench.materialised import MaterialisedPass, check_materialised
from scripts.bench.memory import PeakMemory, Stage
from scripts.bench.plain import PlainRun
from scripts.bench.settings import bench_overrides, run_in
from scripts.bench.split import Split
from scripts.bench.turns import Fit, GlobalSettings
from scripts.plain_decoder import check_plain
from train.callbacks.recording import flops_per_token
from train.config import RunConfig, compose
from train.devices import peak_flops

WARM_UP = 3
"""Steps of a contender before the clock counts, at least."""

TRACKED, BARE, PLAIN, MATERIALISED = "sinklab+stats", "sinklab", "plain", "materialised"

ORDER = (TRACKED, BARE, PLAIN, MATERIALISED)

MAX_PERIOD = 100
"""Steps of a burst, at most."""


@dataclass(kw_only=True)
class Options:
    """What the command line says beside the runs' settings."""

    rounds: int = 4
    """Bursts of each contender."""
    rows: int | None = None
    """Rows of a micro-batch; None is the preset's."""
    agree: int = 50
    """Steps after which losses are compared."""
    tolerance: float = 0.02
    """Largest difference of those losses, nats a label."""
    every: int = 100
    """Steps between two materialised passes."""
    vocab_size: int | None = None
    """Ids that the models know; None is the tokenizer's."""
    compile: bool = False
    """Compile the plain peer on a CPU too."""

    def __post_init__(self):
        for name, least in (("rounds", 2), ("agree", 1), ("every", 1)):
            value = getattr(self, name)
            require(value >= least, f"--{name}", f"must be >= {least}", value)
        valid = self.rows is None or self.rows >= 1
        require(valid, "--rows", "must be >= 1", self.rows)


def measure(
    preset: str, overrides: list[str], options: Options
) -> tuple[list[dict[str, Any]], list[str]]:
    """An entry for each contender, in the order of the table; and a line for each that doesn't
    train as ``sinklab+stats`` does, whose entries compare what isn't the same.

    Raises ``UserError`` for settings that can't be used.
    """
    with TemporaryDirectory(prefix="sinklab-bench-") as folder:
        bench = Bench(preset, overrides, options, Path(folder))
        with bench.ended():
            return bench.measure(), bench.apart


def agreement(losses: dict[str, list[float]], tolerance: float) -> tuple[list[str], list[str]]:
    """A line for each contender's latest loss beside ``sinklab+stats``'s of the same step; and of
    these the lines of those that are more than ``tolerance`` apart, or no numbers."""
    lines, apart = [], []
    for name, theirs in losses.items():
        step, ours = len(theirs), losses[TRACKED][len(theirs) - 1]
        line = f"loss of step {step}: {TRACKED} {ours:.5f}, {name} {theirs[-1]:.5f}"
        if name != TRACKED:
            lines.append(line)
        if not abs(theirs[-1] - ours) <= tolerance:
            apart.append(line)
    return lines, apart


class Bench:
    """Contenders of one preset, in the order in which they are made."""

    def __init__(self, preset: str, overrides: list[str], options: Options, folder: Path):
        self.preset, self.options = preset, options
        self.folder = folder
        self.stage = Stage()
        self.before = GlobalSettings.now()
        self.peaks: dict[str, PeakMemory] = {}
        self.losses: dict[str, list[float]] = {}
        self.apart: list[str] = []
        self.runs: dict[str, Fit | PlainRun] = {}
        self.calls: dict[str, Callable[[], None]] = {}
        self.overrides = bench_overrides(preset, overrides, options.rows)
        self.config, _ = compose(self.overrides)
        tracking = self.config.tracking
        is_on = tracking.statistics is not StatisticsLevel.off
        rule = "must not be off, with which it is compared"
        require(is_on, "tracking.statistics", rule, tracking.statistics.value)
        # What is done at log steps is a part of every burst.
        self.period = math.lcm(tracking.log_every, tracking.sinks_every)
        rule = f"and tracking.sinks_every must meet within {MAX_PERIOD} steps"
        require(self.period <= MAX_PERIOD, "tracking.log_every", rule, tracking.log_every)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """End the runs, whatever happens in here; the process is as before."""
        try:
            yield
        finally:
            for run in self.runs.values():
                if isinstance(run, Fit) and run.is_waiting:
                    self.stage.enter(run)
                    run.stop()
            self.before.apply()
            # Presets share code, and each compiled variant of it counts towards a limit.
            torch.compiler.reset()

    def measure(self) -> list[dict[str, Any]]:
        """The entries."""
        tracked = self._fit(TRACKED, [])
        self.device = tracked.module.device
        self.clock: Clock = CudaClock() if self.device.type == "cuda" else HostClock()
        self.bf16 = "bf16" in str(tracked.turns.trainer.precision)
        self.vocab_size = tracked.module.decoder.vocab_size
        weights = tracked.module.decoder.state_dict()
        weights = {name: value.cpu().clone() for name, value in weights.items()}
        self._warm_up(TRACKED, self.options.agree)
        self.stage.make_room(self.peaks[TRACKED].gib, contenders=3)
        bare = self._fit(BARE, ["tracking.statistics=off"])
        # As many steps as the others: a run of fewer was faster, most likely since what its
        # products draw of the card's power, and so the clock, depends on what they multiply.
        self._warm_up(BARE, self.options.agree)
        if self._can_be(MATERIALISED, check_materialised):
            self._add_materialised(bare)
        if self._can_be(PLAIN, check_plain):
            self._add_plain(weights)
            self._warm_up(PLAIN, self.options.agree)
        lines, apart = agreement(self.losses, self.options.tolerance)
        for line in lines:
            print(f"{self.preset}: {line}", flush=True)
        self.apart = [f"{self.preset}: {line}" for line in apart]

        bursts = {name: 1 if name == MATERIALISED else self.period for name in self.calls}
        timings = interleaved(
            list(self.calls.items()),
            clock=self.clock,
            rounds=self.options.rounds,
            burst_calls=bursts,
        )
        self.stage.enter(tracked)
        tracked.steps(1)
        split_ms = tracked.split(self.period, Split(self.clock))
        entries = [self._entry(name, timings) for name in ORDER if name in self.calls]
        entries[0]["split_ms"] = {part: round(ms, 3) for part, ms in split_ms.items()}
        return entries

    def _can_be(self, name: str, check: Callable[[RunConfig], None]) -> bool:
        try:
            check(self.config)
        except UserError as error:
            print(f"{self.preset}: no {name}: {error}", flush=True)
            return False
        return True

    def _fit(self, name: str, overrides: list[str]) -> Fit:
        """A run up to its first step, which has the device."""
        self.stage.leave()
        self.before.apply()
        self.peaks[name] = PeakMemory()
        config, settings = run_in(self.folder / name, [*self.overrides, *overrides])
        fit = Fit(config, settings, self.options.vocab_size)
        self.runs[name] = fit
        fit.start()
        self.stage.enter(fit)
        self.calls[name] = self.stage.turn(fit, fit.steps)
        return fit

    def _add_materialised(self, bare: Fit) -> None:
        take = MaterialisedPass(bare.module.decoder, bf16=self.bf16)
        self.peaks[MATERIALISED] = self.peaks[BARE].copy()
        self.calls[MATERIALISED] = self.stage.turn(bare, lambda: take(bare.turns.batch))
        with self.peaks[MATERIALISED].counting():
            self.calls[MATERIALISED]()

    def _add_plain(self, weights: dict[str, Tensor]) -> None:
        self.stage.leave()
        self.before.apply()
        self.peaks[PLAIN] = PeakMemory()
        on_gpu = self.device.type == "cuda"
        plain = PlainRun(
            self.config,
            self.vocab_size,
            weights,
            self.device,
            bf16=self.bf16,
            compiled=on_gpu or self.options.compile,
        )
        self.runs[PLAIN] = plain
        self.stage.enter(plain)
        self.calls[PLAIN] = self.stage.turn(plain, plain.steps)
        if on_gpu:
            for backend, milliseconds in plain.choose_backend(self.clock).items():
                line = f"plain with {backend} attention: {milliseconds:.2f} ms a step"
                print(f"{self.preset}: {line}", flush=True)

    def _warm_up(self, name: str, steps: int) -> None:
        run = self.runs[name]
        with self.peaks[name].counting():
            start = time.perf_counter()
            losses = run.losses(1)
            run.seconds_to_first_step += time.perf_counter() - start
            line = f"{name}: first step after {run.seconds_to_first_step:.0f} s"
            print(f"{self.preset}: {line}", flush=True)
            losses += run.losses(max(steps, WARM_UP) - 1)
        self.losses[name] = losses

    def _entry(self, name: str, timings: dict[str, Timing]) -> dict[str, Any]:
        timing, extra = timings[name], {}
        run = self.runs[BARE if name == MATERIALISED else name]
        if name == MATERIALISED:
            every = self.options.every
            extra = {"every": every, "pass_ms": round(timing.median, 3)}
            bare = timings[BARE]
            timing = Timing(
                bare.median + timing.median / every, bare.spread + timing.spread / every
            )
        if isinstance(run, PlainRun) and run.model.backend is not None:
            extra["attention"] = run.model.backend.name
        packing = self.config.packing
        speed = packing.batch_tokens / timing.median * 1000
        peak = peak_flops(self.device, torch.bfloat16 if self.bf16 else torch.float32)
        decoder = self.runs[TRACKED].module.decoder
        flops = flops_per_token(decoder, packing.context)
        ratio = timings[PLAIN].median / timing.median if PLAIN in timings else None
        losses = self.losses.get(name)
        return {
            "preset": self.preset,
            "implementation": name,
            "tokens_per_second": round(speed),
            "mfu": round(speed * flops / peak, 4) if peak else None,
            "peak_gib": round(self.peaks[name].gib, 3) if self.device.type == "cuda" else None,
            "ms": round(timing.median, 3),
            "spread_ms": round(timing.spread, 3),
            "ratio_to_plain": ratio and round(ratio, 4),
            "seconds_to_first_step": round(run.seconds_to_first_step, 2),
            "loss": losses and {"step": len(losses), "nats": losses[-1]},
            "rows": packing.micro_batch_rows,
            "micro_batches": packing.micro_batches(1),
            "context": packing.context,
            "vocab_size": self.vocab_size,
            "parked": self.stage.parking,
        } | extra
