"""What the sink statistics cost: training steps of each level against ``off``, in one process.

    python -m scripts.bench [--steps N] [--json FILE] [overrides]

Takes the settings of ``python -m train``. The levels take turns, a step each, on the same batches,
and each level's median step is printed with its ratio to ``off``: a ratio from one process is worth
more than two figures from two. A step is forward, loss, backward, the sums over the statistics that
training keeps, gradient clipping and the optimizer's update.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from kernels.attention import StatisticsLevel
from models.batch import PackedBatch
from models.decoder import Decoder
from train.config import RunConfig, compose
from train.data import data_of
from train.metrics import SinkTotals
from train.mistakes import exit_code
from train.optimizers import build_optimizer

WARM_UP = 5
"""Steps of each level before the clock counts."""


class Stepper:
    """A model with its optimizer that makes training steps at one level of statistics."""

    def __init__(self, config: RunConfig, vocab_size: int, level: StatisticsLevel, device: str):
        torch.manual_seed(config.seed)
        self.level = level
        self.decoder = Decoder(config.model, config.attention, vocab_size).to(device)
        self.optimizer = build_optimizer(self.decoder, config.optimizer)
        self.totals = SinkTotals(config.model.num_layers)
        self.clip = config.optimizer.clip
        self.positions = config.tracking.positions
        self.seconds: list[float] = []

    def step(self, batch: PackedBatch) -> float:
        start = time.perf_counter()
        taps = [] if self.level is StatisticsLevel.off else self.decoder.key_mass_taps(batch)
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=batch.tokens_BT.is_cuda)
        with autocast:
            output = self.decoder.loss(batch, statistics=self.level, key_mass_taps=taps or None)
        loss = output.loss / batch.num_labels
        loss.backward()
        if taps:
            measured = [
                record.statistics._replace(key_mass_BHS=tap.grad)
                for record, tap in zip(output.layers, taps, strict=True)
            ]
            masks = self.decoder.layer_masks(batch.mask)
            self.totals.add(measured, masks, batch.begins_BT, self.positions)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.item()
        self.seconds.append(time.perf_counter() - start)
        return loss


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each level")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options, overrides = parser.parse_known_args(arguments)
    config, _ = compose(overrides)
    data = data_of(config)
    data.setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steppers = [Stepper(config, data.vocab_size, level, device) for level in StatisticsLevel]
    batches = itertools.islice(data.train_dataloader(), WARM_UP + options.steps)
    for batch in batches:
        batch = batch.to(device)
        losses = {stepper.step(batch) for stepper in steppers}
        # The statistics must not change the training.
        if max(losses) - min(losses) > 1e-3:
            raise AssertionError(f"levels disagree on the loss: {losses}")
    medians = {s.level: statistics.median(s.seconds[WARM_UP:]) for s in steppers}
    batch_size, context = batch.tokens_BT.shape
    print(f"{device}, {torch.get_num_threads()} threads, {batch_size} rows of {context} tokens")
    rows = [
        {
            "statistics": level.value,
            "milliseconds": round(1000 * seconds, 3),
            "ratio_to_off": round(seconds / medians[StatisticsLevel.off], 4),
        }
        for level, seconds in medians.items()
    ]
    for row in rows:
        print(f"{row['statistics']:6} {row['milliseconds']:9.2f} ms {row['ratio_to_off']:7.3f}x")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
