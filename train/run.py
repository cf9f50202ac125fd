"""One run, from its settings to its folder."""

import time
from dataclasses import asdict

import lightning as L
import torch
from rich.console import Console

from data.module import TokenDataModule
from kernels.attention import StatisticsLevel
from kernels.errors import UserError, require
from models.decoder import Decoder
from train.branching import find_parent, start_from
from train.callbacks.checkpoints import CheckpointSchedule, RandomState, check_state_file
from train.callbacks.finite import FiniteCheck
from train.callbacks.head_maps import HeadMaps
from train.callbacks.progress import ProgressDisplay
from train.callbacks.recording import RowWriter, ThroughputMonitor, Validation
from train.callbacks.sink_monitor import SinkMonitor
from train.config import Accelerator, Precision, RunConfig, TrainerConfig
from train.data import data_of
from train.figures import draw_figures
from train.loggers import MetricsCSV, WandbRun, build_wandb_logger, wandb_mode
from train.metrics import HORIZON
from train.module import PretrainModule
from train.parallel import ask_no_other_rank, trainer_arguments
from train.provenance import provenance
from train.ranks import is_first, join, one_mistake
from train.run_folder import (
    PARENT,
    RunFolder,
    drop_after,
    open_run_folder,
    write_run_files,
)
from train.schedules import ConstantSchedule, check_schedule
from train.summary import print_summary
from train.wandb_names import FIGURES


def run(
    config: RunConfig,
    *,
    settings: dict,
    experiment: str,
    overrides: list[str],
    skip_finished: bool = False,
) -> None:
    """Train as ``config`` says and leave the run folder.

    settings: ``config`` as plain values, which is what is hashed and stored. skip_finished: leave a
    run that has made all its steps as it is, rather than raise UserError. Every check that can
    fail runs before the first file is written; a user's mistake raises UserError. Of many ranks,
    each calls this; all find what is wrong, the first alone writes and talks.
    """
    console = Console(markup=False)
    accelerator, precision = device_of(config.trainer)
    world_size = join(config.trainer, accelerator)
    with one_mistake():
        total_steps = check_schedule(config.schedule, config.trainer.max_steps)
        if not isinstance(config.schedule, ConstantSchedule):
            # A resume may lengthen the run, but not bend the curve it is on.
            settings["schedule"]["total_steps"] = total_steps
        if config.init_from is not None:
            settings[PARENT] = find_parent(settings)
        parent = settings.get(PARENT)
        mode = wandb_mode(config.logger) if is_first() else "disabled"
        folder, resuming = open_run_folder(settings, experiment, overrides)
        if skip_finished and folder.is_finished(config.trainer.max_steps):
            console.print(f"finished before: {folder.path}", highlight=False, soft_wrap=True)
            return

        data = data_of(config)
        accumulation = data.accumulation(world_size)
        start = time.perf_counter()
        data.setup()
        L.seed_everything(config.seed, verbose=False)
        module = PretrainModule(
            Decoder(config.model, config.attention, data.vocab_size),
            config.optimizer,
            config.schedule,
            total_steps,
            config.tracking.statistics,
            config.packing.batch_tokens,
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

    metrics, wandb_logger = MetricsCSV(folder.metrics), None
    with one_mistake():
        if is_first():
            _print_start(console, config, module, data, folder, step, time.perf_counter() - start)
            device = torch.cuda.get_device_name() if accelerator == "gpu" else "cpu"
            measured = {"alpha_kind": module.decoder.alpha_kind}
            origin = provenance(settings, experiment, device, _data_provenance(data)) | measured
            run_id = write_run_files(folder, settings, origin)
            data.tokenizer.save(folder.tokenizer)
            drop_after(folder, step)
            metrics.keep_until(step)
            wandb_logger = build_wandb_logger(
                config.logger,
                mode,
                folder.path,
                run_id,
                settings,
                measured,
                experiment=experiment,
                overrides=overrides,
            )

    validation, rows, callbacks = _callbacks(config, data, folder, console, wandb_logger)
    trainer = L.Trainer(
        accelerator=accelerator,
        **trainer_arguments(config.trainer, world_size),
        precision=precision,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=accumulation,
        deterministic=config.trainer.deterministic,
        callbacks=callbacks,
        logger=[metrics] if wandb_logger is None else [metrics, wandb_logger],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder.path,
    )
    if world_size > 1:
        ask_no_other_rank(trainer)
    started = time.perf_counter()
    ckpt_path = str(folder.last) if resuming else None
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    training_seconds = time.perf_counter() - started - module.seconds_outside
    if trainer.is_global_zero:
        figures = draw_figures(folder) if config.tracking.figures else []
        if wandb_logger is not None:
            pictures = {f"{FIGURES}/{path.stem}": str(path) for path in figures}
            wandb_logger.log_figures(pictures, trainer.global_step)
            wandb_logger.experiment.finish()
        print_summary(
            console,
            folder,
            data,
            validation.latest,
            rows.latest,
            training_seconds,
            is_proxy=module.decoder.alpha_kind == "proxy",
        )


def device_of(trainer: TrainerConfig) -> tuple[str, str]:
    """Lightning's names of accelerator and precision. Raises UserError for what isn't there."""
    accelerator = trainer.accelerator
    if accelerator is Accelerator.auto:
        accelerator = Accelerator.gpu if torch.cuda.is_available() else Accelerator.cpu
    if accelerator is Accelerator.gpu and not torch.cuda.is_available():
        raise UserError("trainer.accelerator must be cpu where there is no GPU, got gpu")
    precision = trainer.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if accelerator is Accelerator.gpu else Precision.fp32
    return accelerator.value, {Precision.bf16: "bf16-mixed", Precision.fp32: "32-true"}[precision]


def _callbacks(
    config: RunConfig,
    data: TokenDataModule,
    folder: RunFolder,
    console: Console,
    wandb_logger: WandbRun | None,
) -> tuple[Validation, RowWriter, list[L.Callback]]:
    """The callbacks in the order in which they must run: measure, write the row, checkpoint."""
    tracking, max_steps = config.tracking, config.trainer.max_steps
    sink_monitor = None
    if tracking.statistics is not StatisticsLevel.off:
        sink_monitor = SinkMonitor(tracking, folder.sinks, config.model.num_layers)
    validation = Validation(tracking, data, max_steps)
    rows = RowWriter(tracking, data)
    callbacks = [
        RandomState(),
        FiniteCheck(tracking, folder, max_steps, config.packing.batch_rows),
        ThroughputMonitor(tracking, config.packing.context),
        validation,
        rows,
        CheckpointSchedule(tracking, folder, max_steps, sink_monitor),
    ]
    if sink_monitor is not None:
        callbacks.insert(2, sink_monitor)
    if wandb_logger is not None:
        callbacks.insert(callbacks.index(rows), HeadMaps(validation, wandb_logger))
    if config.trainer.progress:
        callbacks.append(ProgressDisplay(console, rows, max_steps))
    return validation, rows, callbacks


def _check_positions(decoder: Decoder, context: int) -> None:
    """Raise ``UserError`` if a row is longer than the position encoding knows."""
    known = decoder.position.max_positions
    needed = context + (decoder.sink_token is not None)
    allowed = f"must be >= {needed} for packing.context = {context}"
    require(known is None or needed <= known, "model.max_positions", allowed, known)


def _data_provenance(data: TokenDataModule) -> dict:
    """What was trained on, and what packing did to it."""
    return {
        "sha256": data.sha256,
        "store_sha256": data.corpus.store.sha256,
        "tokenizer_sha256": data.tokenizer.sha256,
        "packing": asdict(data.report),
    }


def _print_start(
    console: Console,
    config: RunConfig,
    module: PretrainModule,
    data: TokenDataModule,
    folder: RunFolder,
    step: int,
    seconds: float,
) -> None:
    parameters = module.decoder.num_parameters()
    lines = [
        f"model    {config.model.num_layers} layers, {parameters.total / 1e6:.2f}M parameters "
        f"({parameters.non_embedding / 1e6:.2f}M without embeddings)",
        *data.describe(),
        f"run      {folder.path}" + (f", going on from step {step}" if step >= 0 else ""),
    ]
    if config.init_from is not None and step < 0:
        lines.append(f"start    the weights of {config.init_from}")
    if config.resume and step < 0:
        lines.append(f"no checkpoint to resume in {folder.path}: starting from the beginning")
    windows = [config.attention.window_of(layer) for layer in range(config.model.num_layers)]
    short = [window is not None and window < HORIZON for window in windows]
    if config.packing.context < HORIZON or all(short):
        lines.append(f"no key is seen by {HORIZON} queries here, so there will be no sink figures")
    elif any(short):
        whose = f"the {short.count(False)} of {len(short)} layers"
        lines.append(f"sink figures are of {whose} in which {HORIZON} queries see a key")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
