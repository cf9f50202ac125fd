"""Starting a run from weights that another run kept: ``init_from=RUN@STEP``.

A branch takes its parent's weights and nothing else: optimizer, step and place in the data are new,
and any setting may differ that leaves the shapes as they are (mask, BOS, window, learning rate).
What it started from is stored beside its settings and in its provenance.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from kernels.errors import UserError, require
from models.decoder import Decoder
from train.privacy import private
from train.run_folder import PARENT, RunFolder
from train.runs import Checkpoint, load_run

SHAPES = ("num_layers", "d_model", "num_heads", "resolved_num_kv_heads", "resolved_head_dim")
"""Settings that cut the weights up; two models of equal tensors may differ in them."""


def split_init_from(init_from: str) -> tuple[Path, int | str]:
    """``RUN@STEP`` as a folder and a step. Raises ``UserError`` for anything else."""
    run, _, step = init_from.rpartition("@")
    is_step = step == "last" or (step.isascii() and step.isdigit())
    rule = "must be RUN@STEP, a run folder and a number or last"
    require(run != "" and is_step, "init_from", rule, init_from)
    return Path(run).expanduser(), step if step == "last" else int(step)


def find_parent(settings: dict) -> dict:
    """Where the weights of ``settings["init_from"]`` are and which: what is stored as the parent.

    path, run_id, arm (its ``arm_hash``), step, weights_sha256. A run that is resumed with its
    ``run_dir`` keeps what its folder says, so that its parent may be gone by then or have gone on;
    without ``run_dir`` the parent is needed, as its weights are part of the folder's name.
    Raises ``UserError`` for no run folder or a step that it didn't keep.
    """
    if settings["resume"] and settings["run_dir"]:
        stored = _stored(RunFolder(Path(settings["run_dir"]).expanduser()).config)
        if private(stored.get("init_from")) == settings["init_from"] and PARENT in stored:
            return stored[PARENT]
    path, step = split_init_from(settings["init_from"])
    try:
        run = load_run(path)
        kept = run.at(step)
        digest = kept.weights_sha256
    except UserError as error:
        raise UserError(f"init_from={settings['init_from']}: {error}") from None
    return {
        "path": private(str(run.path.resolve())),
        "run_id": run.run_id,
        "arm": run.arm_hash,
        "step": kept.step,
        "weights_sha256": digest,
    }


def start_from(decoder: Decoder, parent: dict, tokenizer_sha256: str) -> None:
    """Give ``decoder`` the weights of ``find_parent``'s answer.

    Raises ``UserError`` if they have changed since, if the tokenizer is another, or naming the
    first setting or weight that doesn't fit.
    """
    run = load_run(Path(parent["path"]).expanduser())
    kept = run.at(parent["step"])
    where = f"init_from={kept.path}"
    if kept.weights_sha256 != parent["weights_sha256"]:
        raise UserError(f"{where} must hold the weights that the run started from, got others")
    theirs = run.provenance["data"]["tokenizer_sha256"]
    if theirs != tokenizer_sha256:
        raise UserError(
            f"{where} must have this run's tokenizer, sha256 {tokenizer_sha256[:12]}, "
            f"got one of {theirs[:12]}"
        )
    _check_fits(decoder, kept, where)
    decoder.load_state_dict(kept.model.state_dict())


def _check_fits(decoder: Decoder, kept: Checkpoint, where: str) -> None:
    for name in SHAPES:
        ours, theirs = (getattr(model.config, name) for model in (decoder, kept.model))
        setting = f"model.{name.removeprefix('resolved_')}"
        require(ours == theirs, setting, f"must be {theirs} as in {where}", ours)
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        for model in (decoder, kept.model)
    )
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if ours.get(name) != theirs.get(name):
            here, there = (shapes.get(name, "absent") for shapes in (ours, theirs))
            raise UserError(f"{where} must fit the model: {name} is {there} there, {here} here")


def _stored(path: Path) -> dict:
    """The settings in a config.yaml, nothing where there is none that can be read."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
