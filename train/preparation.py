"""Everything about a run that can be wrong, found before its first file is written."""

from __future__ import annotations

from typing import NamedTuple

import lightning as L

from data.module import TokenDataModule
from kernels.errors import UserError, require
from models.decoder import Decoder
from train.branching import find_parent, start_from
from train.callbacks.checkpoints import check_state_file, is_finished
from train.config import RunConfig
from train.data import data_of
from train.devices import compiled_part
from train.metrics import HORIZON
from train.module import PretrainModule
from train.ranks import is_first
from train.run_folder import PARENT, RunFolder, open_run_folder, run_path
from train.schedules import ConstantSchedule, check_schedule
from train.wandb_mode import wandb_mode


class Prepared(NamedTuple):
    """A run that can start.

    resuming: whether it goes on from ``folder.last``; step: the one that has, or -1. accumulation:
    micro-batches of a rank in a step. wandb_mode: as W&B knows it.
    """

    folder: RunFolder
    data: TokenDataModule
    module: PretrainModule
    resuming: bool
    step: int
    accumulation: int
    wandb_mode: str


def prepared(
    config: RunConfig,
    settings: dict,
    *,
    experiment: str,
    overrides: list[str],
    accelerator: str,
    world_size: int,
    vocab_size: int | None,
    skip_finished: bool,
) -> Prepared | RunFolder:
    """The run of these settings, or its folder alone if it has made all its steps before.

    Completes ``settings``; the rest as in ``train.run.run``. Raises ``UserError``.
    """
    total_steps = complete(config, settings)
    parent = settings.get(PARENT)
    folder, resuming = open_run_folder(settings, experiment, overrides)
    if skip_finished and is_finished(folder, config.trainer.max_steps):
        return folder
    # It may wait for a server, and warn.
    mode = wandb_mode(config.logger) if is_first() else "disabled"

    data = data_of(config)
    accumulation = data.accumulation(world_size)
    data.setup()
    vocab_size = data.vocab_size if vocab_size is None else vocab_size
    allowed = f"must be >= {data.vocab_size}, the tokenizer's"
    require(vocab_size >= data.vocab_size, "the model's vocabulary", allowed, vocab_size)
    L.seed_everything(config.seed, verbose=False)
    module = PretrainModule(
        Decoder(config.model, config.attention, vocab_size),
        config.optimizer,
        config.schedule,
        total_steps,
        config.tracking.statistics,
        config.packing.batch_tokens,
        compiled_part(config.trainer, accelerator, world_size),
    )
    _check_positions(module.decoder, config.packing.context)
    allowed = f"must be [] for packing.context < {HORIZON}"
    probed, long = config.tracking.probes, config.packing.context >= HORIZON
    require(long or not probed, "tracking.probes", allowed, probed)
    step = check_state_file(folder, module, data) if resuming else -1
    if parent is not None and not resuming:
        start_from(module.decoder, parent, data.tokenizer.sha256)
    if step >= config.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps must be > {step} to go on with the run in {folder.path}, "
            f"got {config.trainer.max_steps}"
        )
    return Prepared(folder, data, module, resuming, step, accumulation, mode)


def complete(config: RunConfig, settings: dict) -> int:
    """Add to ``settings`` what a run's hash and folder take beside them; returns total_steps.

    Raises ``UserError`` for a schedule or weights to start from that can't be.
    """
    total_steps = check_schedule(config.schedule, config.trainer.max_steps)
    if not isinstance(config.schedule, ConstantSchedule):
        # A resume may lengthen the run, but not bend the curve it is on.
        settings["schedule"]["total_steps"] = total_steps
    if config.init_from is not None:
        settings[PARENT] = find_parent(settings)
    return total_steps


def folder_of(
    config: RunConfig, settings: dict, experiment: str, overrides: list[str]
) -> RunFolder | None:
    """The folder of the run of these settings, None where they don't say so or it isn't there."""
    try:
        complete(config, settings)
    except UserError:
        return None
    folder = RunFolder(run_path(settings, experiment, overrides))
    return folder if folder.path.is_dir() else None


def _check_positions(decoder: Decoder, context: int) -> None:
    """Raise ``UserError`` if a row is longer than the position encoding knows."""
    known = decoder.position.max_positions
    needed = context + (decoder.sink_token is not None)
    allowed = f"must be >= {needed} for packing.context = {context}"
    require(known is None or needed <= known, "model.max_positions", allowed, known)
