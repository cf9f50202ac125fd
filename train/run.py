"""One run, from its settings to its folder."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import lightning as L
import torch
from rich.console import Console

from data.module import TokenDataModule
from train.callbacks.checkpoints import StateFileIO
from train.callbacks.of_runs import RunCallbacks
from train.callbacks.stopping import Stopping
from train.config import RunConfig
from train.devices import device_of, new_memory_as_it_is
from train.figures import draw_figures
from train.going_on import drop_after
from train.loggers import MetricsCSV, build_wandb_logger
from train.metrics import HORIZON
from train.parallel import ask_no_other_rank, trainer_arguments
from train.preparation import Prepared, prepared
from train.provenance import provenance
from train.ranks import is_first, join, one_mistake
from train.run_folder import write_run_files
from train.stopping import StopSignals
from train.summary import print_summary
from train.wandb_names import FIGURES


def run(
    config: RunConfig,
    *,
    settings: dict,
    experiment: str,
    overrides: list[str],
    skip_finished: bool = False,
    brief: bool = False,
    signals: StopSignals | None = None,
    vocab_size: int | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train as ``config`` says and leave the run folder.

    settings: ``config`` as plain values, which is what is hashed and stored. skip_finished: leave a
    run that has made all its steps as it is, rather than raise UserError. brief: print less,
    as of one of many. signals: entered by the caller, end the run with its state saved. vocab_size:
    ids that the model is to know, at least the tokenizer's, which are the default. callbacks:
    called after the run's own.

    Every check that can fail runs before the first file is written; a user's mistake raises
    UserError. Of many ranks, each calls this; all find what is wrong, the first alone writes and
    talks.
    """
    began = time.perf_counter()
    console = Console(markup=False)
    accelerator, precision = device_of(config.trainer)
    world_size = join(config.trainer, accelerator)
    with one_mistake():
        ready = prepared(
            config,
            settings,
            experiment=experiment,
            overrides=overrides,
            accelerator=accelerator,
            world_size=world_size,
            vocab_size=vocab_size,
            skip_finished=skip_finished,
        )
    if not isinstance(ready, Prepared):
        if is_first():
            if config.tracking.figures and not ready.figures.exists():
                draw_figures(ready)
            console.print(f"finished before: {ready.path}", highlight=False, soft_wrap=True)
        return

    folder, data, module = ready.folder, ready.data, ready.module
    metrics, wandb_logger, run_id = MetricsCSV(folder.metrics), None, None
    with one_mistake():
        if is_first():
            _print_start(console, config, ready, brief)
            device = torch.cuda.get_device_name() if accelerator == "gpu" else "cpu"
            measured = {"alpha_kind": module.decoder.alpha_kind}
            origin = provenance(settings, experiment, device, _data_provenance(data)) | measured
            run_id = write_run_files(folder, settings, origin)
            data.tokenizer.save(folder.tokenizer)
            drop_after(folder, ready.step)
            metrics.keep_until(ready.step)
            wandb_logger = build_wandb_logger(
                config.logger,
                ready.wandb_mode,
                folder.path,
                run_id,
                settings,
                measured,
                experiment=experiment,
                overrides=overrides,
            )

    stopping = Stopping(signals or StopSignals(), folder)
    own = RunCallbacks(config, data, folder, console, wandb_logger, stopping, run_id, began, brief)
    trainer = L.Trainer(
        accelerator=accelerator,
        **trainer_arguments(config.trainer, world_size, [StateFileIO()]),
        precision=precision,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=ready.accumulation,
        deterministic=config.trainer.deterministic,
        callbacks=[*own.ordered, *callbacks],
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
    ckpt_path = str(folder.last) if ready.resuming else None
    try:
        with new_memory_as_it_is():
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except BaseException:
        if wandb_logger is not None:
            wandb_logger.leave()
        raise
    training_seconds = time.perf_counter() - started - module.seconds_outside
    if trainer.is_global_zero:
        figures = draw_figures(folder) if config.tracking.figures else []
        if wandb_logger is not None:
            pictures = {f"{FIGURES}/{path.stem}": str(path) for path in figures}
            wandb_logger.log_figures(pictures, trainer.global_step)
            wandb_logger.finish()
        print_summary(
            console,
            folder,
            data,
            own.validation.latest,
            own.rows.latest,
            training_seconds,
            time.perf_counter() - began,
            is_proxy=module.decoder.alpha_kind == "proxy",
            brief=brief,
        )


def _data_provenance(data: TokenDataModule) -> dict:
    """What was trained on, and what packing did to it."""
    return {
        "sha256": data.sha256,
        "store_sha256": data.corpus.store.sha256,
        "tokenizer_sha256": data.tokenizer.sha256,
        "packing": asdict(data.report),
    }


def _print_start(console: Console, config: RunConfig, ready: Prepared, brief: bool) -> None:
    folder, data, module, step = ready.folder, ready.data, ready.module, ready.step
    parameters = module.decoder.num_parameters()
    about = [
        f"model    {config.model.num_layers} layers, {parameters.total / 1e6:.2f}M parameters "
        f"({parameters.non_embedding / 1e6:.2f}M without embeddings)",
        *data.describe(),
    ]
    lines = [] if brief else about
    lines.append(f"run      {folder.path}" + (f", going on from step {step}" if step >= 0 else ""))
    if config.init_from is not None and step < 0:
        lines.append(f"start    the weights of {config.init_from}")
    # Nobody asked the new runs of a sweep to resume.
    if config.resume and step < 0 and (folder.config.exists() or not brief):
        missing = "no checkpoint" if folder.config.exists() else "no run"
        lines.append(f"{missing} to resume in {folder.path}: starting from the beginning")
    windows = [config.attention.window_of(layer) for layer in range(config.model.num_layers)]
    short = [window is not None and window < HORIZON for window in windows]
    if config.packing.context < HORIZON or all(short):
        lines.append(f"no key is seen by {HORIZON} queries here, so there will be no sink figures")
    elif any(short):
        whose = f"the {short.count(False)} of {len(short)} layers"
        lines.append(f"sink figures are of {whose} in which {HORIZON} queries see a key")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
