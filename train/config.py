"""The typed settings of a run, and their registration with Hydra.

Each section's dataclass lies beside the class it configures; this module puts them together. A
dictionary of variants (``ATTENTIONS``, ``CORPORA``, ...) becomes a Hydra group here, so a new
variant needs no YAML: its file and its line in the dictionary make it a choice on the command line.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import hydra
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.packing import PackingConfig
from kernels.errors import UserError, require
from models.checkpoints import check_plain
from models.decoder_config import DecoderConfig
from train.kinds import GROUPS, kind_of, told_kind
from train.mistakes import no_setting
from train.privacy import private, with_home
from train.run_folder import PARENT
from train.tracking import TrackingConfig
from train.wandb_mode import LoggerConfig


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Accelerator(StrEnum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Compile(StrEnum):
    auto = "auto"
    nothing = "nothing"
    blocks = "blocks"
    whole = "whole"


class StrategyName(StrEnum):
    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and on what a run trains."""

    max_steps: int = 1000
    """Updates to make."""
    accelerator: Accelerator = Accelerator.auto
    """Where to train; auto takes a GPU when there is one."""
    precision: Precision = Precision.auto
    """Arithmetic of forward and backward; auto = bf16 mixed precision on GPUs, fp32 on CPUs."""
    compile: Compile = Compile.auto
    """What the compiler gets of a training step: nothing; blocks, one by one, ready in seconds;
    whole, the model with its loss in one graph, faster by what fuses between blocks but ready in a
    minute. fsdp takes blocks for whole. auto = blocks on GPUs, nothing on CPUs. Evaluations are
    never compiled."""
    devices: int | str = 1
    """GPUs, or processes on a CPU, of each machine; auto = all GPUs. They share the rows of
    ``packing.batch_tokens``: what is trained doesn't depend on it."""
    num_nodes: int = 1
    """Machines; more than one are started by torchrun or srun."""
    strategy: StrategyName = StrategyName.auto
    """How several devices share the work: ddp, a copy of the model each; fsdp, FSDP2, each keeps a
    part of every weight; auto = ddp."""
    num_workers: int = 0
    """Processes that make batches; 0 makes them in the training process."""
    deterministic: bool = True
    """Only use operations that give the same bits every time."""
    progress: bool = True
    """Show a progress bar on a terminal, or a line now and then elsewhere."""

    def __post_init__(self):
        require(self.max_steps >= 1, "trainer.max_steps", "must be >= 1", self.max_steps)
        require(self.num_workers >= 0, "trainer.num_workers", "must be >= 0", self.num_workers)
        require(self.num_nodes >= 1, "trainer.num_nodes", "must be >= 1", self.num_nodes)
        is_count = isinstance(self.devices, int) and self.devices >= 1
        rule = "must be a number >= 1 or auto"
        require(is_count or self.devices == "auto", "trainer.devices", rule, self.devices)


@dataclass(kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    corpus: Any = MISSING
    tokenizer: Any = MISSING
    packing: PackingConfig = MISSING
    model: DecoderConfig = MISSING
    attention: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    seed: int = 0
    """Seed of the initial weights."""
    data_seed: int = 0
    """Seed of the order of documents and rows."""
    run_dir: str | None = None
    """The run's folder; null = runs/<experiment>/<overrides>-<hash of the settings>."""
    cache_dir: str = ".cache"
    """Folder of tokenizers and token stores, shared by all runs."""
    resume: bool = False
    """Go on from the run folder's last.ckpt; a folder without one starts from the beginning."""
    init_from: str | None = None
    """RUN@STEP: start from the weights that the run in folder RUN kept at STEP, a number or last,
    instead of from ``seed``; optimizer, step and data begin anew."""

    def __post_init__(self):
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            require(0 <= value < 2**31, name, "must be in [0, 2**31)", value)
        # Most often a variable of the shell that isn't set.
        for name in ("run_dir", "cache_dir"):
            value = getattr(self, name)
            require(value != "", name, "must be the path of a folder", value)


@cache
def register_configs() -> None:
    """Tell Hydra's ConfigStore about every section and variant; once is enough."""
    # Hydra copies the store with all its nodes whenever it looks up a group, for --help more than a
    # hundred times. There is one store, and it hands out copies of its nodes already.
    ConfigStore.__deepcopy__ = lambda self, memo: self
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="packing", name="base", node=PackingConfig)
    store.store(group="model", name="base", node=DecoderConfig)
    store.store(group="trainer", name="default", node=TrainerConfig)
    store.store(group="tracking", name="default", node=TrackingConfig)
    store.store(group="logger", name="default", node=LoggerConfig)
    for group, kinds in GROUPS.items():
        for name, config_class in kinds.items():
            store.store(group=group, name=name, node=config_class)


def compose(overrides: list[str]) -> tuple[RunConfig, dict]:
    """The run that ``python -m train <overrides>`` would make: typed, and as plain values."""
    register_configs()
    with initialize_config_module(config_module="conf", version_base="1.3"):
        settings = hydra.compose(config_name="train", overrides=overrides)
    return typed(settings), plain(settings)


def typed(settings: DictConfig) -> RunConfig:
    """The run that composed settings describe.

    Raises ``UserError`` for a value that a section refuses, and for a key that no section has:
    Hydra lets ``+packing.contxt=64`` through, and nobody would read it.
    """
    _check_keys(settings, "")
    config = OmegaConf.to_object(settings)
    assert isinstance(config, RunConfig)
    return config


def _check_keys(node: DictConfig, prefix: str) -> None:
    known = [field.name for field in fields(OmegaConf.get_type(node))]
    for key in node:
        if key not in known:
            raise UserError(no_setting(prefix.rstrip("."), str(key), known))
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            _check_keys(value, f"{prefix}{key}.")


def plain(settings: DictConfig) -> dict:
    """Settings as dictionaries, lists, numbers and strings: what is hashed and stored.

    The sections of ``train.kinds.GROUPS`` begin with their ``kind``; paths are ``private``.
    """
    values = OmegaConf.to_container(settings, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    for group in GROUPS:
        kind = kind_of(group, OmegaConf.get_type(settings, group))
        values[group] = {"kind": kind, **values[group]}
    return private(values)


def restored(settings: dict) -> RunConfig:
    """The run that plain settings describe, as ``plain`` made them; what they lack is the default.

    Raises ``UserError`` for a kind, key or value that doesn't exist here, and for a value that
    OmegaConf would look up elsewhere, as in the environment.
    """
    values = with_home({name: value for name, value in settings.items() if name != PARENT})
    check_plain(values)
    for group, kinds in GROUPS.items():
        section = dict(values[group])
        kind = section.pop("kind", None) or told_kind(group, section)
        require(kind in kinds, f"{group}.kind", f"must be one of {', '.join(kinds)}", kind)
        values[group] = _merged(kinds[kind], section, f"{group}.")
    return typed(_merged(RunConfig, values, ""))


def _merged(config_class: type, values: dict, prefix: str) -> DictConfig:
    schema = OmegaConf.structured(config_class)
    try:
        merged = OmegaConf.merge(schema, values)
    except OmegaConfBaseException as error:
        raise UserError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged
