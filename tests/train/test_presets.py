"""Every shipped preset composes and trains, and the README tells the truth about choices."""

import re
from pathlib import Path

import hydra
import pandas as pd
import pytest
import torch
import yaml
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from data.corpora import CORPORA
from data.corpora.files import FilesCorpus
from models.decoder import Decoder
from train.config import compose, register_configs

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
README = (ROOT / "README.md").read_text()


def yaml_choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


TRAINED_QUICKLY = (
    "gu60m",
    "barbero_packing",
    "bigram_backcopy",
    "gu_prefix",
    "gu_sigmoid",
    "hybrid",
)
"""Experiments unlike each other; the others are trained among the slow tests."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in TRAINED_QUICKLY else pytest.param(name, marks=pytest.mark.slow)
        for name in EXPERIMENTS
    ],
)
def test_every_experiment_trains_under_debug(train, name):
    assert train(f"experiment={name}", "trainer.max_steps=2") == 0


@pytest.mark.parametrize(
    "name",
    [
        # Looks into every package that is installed.
        pytest.param(name, marks=pytest.mark.slow if name == "python_sources" else ())
        for name in yaml_choices("corpus")
    ],
)
def test_every_corpus_preset_is_one_that_can_be_opened(name):
    config, _ = compose([f"corpus={name}"])
    assert type(config.corpus) in {kind.Config for kind in CORPORA.values()}
    if name == "python_sources":
        names = {name for name, *_ in FilesCorpus(config.corpus, ROOT).source["packages"]}
        assert names == set(config.corpus.packages) and len(names) > 10


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_at_full_size_and_tells_its_command(name):
    config, _ = compose([f"experiment={name}"])
    assert config.trainer.max_steps > 100
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert f"experiment={name}" in text
    with torch.device("meta"):
        decoder = Decoder(config.model, config.attention, vocab_size=1000)
    count = decoder.num_parameters().non_embedding
    assert f"# Parameters: {count:,} without embeddings." in text


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_sweep_is_its_own_and_its_ends_compose(name):
    experiment = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
    axes = experiment.get("hydra", {}).get("sweeper", {}).get("params", {})
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert (f"-m experiment={name}" in text) == bool(axes)
    register_configs()
    with initialize_config_module(config_module="conf", version_base="1.3"):
        composed = hydra.compose("train", [f"experiment={name}"], return_hydra_config=True)
    # Not those of an experiment that it builds on too.
    assert (composed.hydra.sweeper.params or {}) == axes
    axes = [f"{key}={values}" for key, values in axes.items()]
    for axis in OverridesParser.create().parse_overrides(axes):
        arms = list(axis.sweep_string_iterator())
        assert len(arms) > 1
        for value in {arms[0], arms[-1]}:
            config, _ = compose([f"experiment={name}", f"{axis.key_or_group}={value}"])
            width = config.model.num_heads * config.model.resolved_head_dim
            assert name == "head_dims" or width == config.model.d_model


@pytest.mark.parametrize("group", ["model", "packing", "corpus", "tokenizer"])
def test_every_choice_in_yaml_composes(group):
    for name in yaml_choices(group):
        compose([f"{group}={name}"])


OPTIMIZERS, SCHEDULES = ("adamw", "muon", "sgd"), ("constant", "cosine", "warmup_stable_decay")


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        # Each of both once; every pair among the slow tests.
        pytest.param(optimizer, schedule, marks=() if place == other else pytest.mark.slow)
        for place, optimizer in enumerate(OPTIMIZERS)
        for other, schedule in enumerate(SCHEDULES)
    ],
)
def test_every_optimizer_and_schedule_trains(train, tmp_path, optimizer, schedule):
    overrides = (f"optimizer={optimizer}", f"schedule={schedule}", "optimizer.lr=0.01")
    assert train(*overrides, "schedule.warmup_steps=1", "trainer.max_steps=3") == 0
    losses = pd.read_csv(tmp_path / "run" / "metrics.csv")["train/loss"].dropna()
    assert losses.iloc[-1] < losses.iloc[0]


def test_gu60m_is_what_the_papers_code_does():
    config, _ = compose(["experiment=gu60m"])
    assert config.packing.batch_tokens == 512 * 2048
    assert config.optimizer.decay == "all" and config.optimizer.weight_decay == 0.1
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.clip) == (0.9, 0.95, 1)
    assert config.schedule.warmup_steps == 100
    assert config.schedule.factor(19_999, 20_000) == 1.0
    assert config.packing.eos and config.packing.bos == "none"
    assert config.tokenizer.bos == config.tokenizer.eos
    assert config.model.initialization == "gu"


def test_the_readme_names_every_choice():
    from data.tokenizers import TOKENIZERS
    from models.attention import ATTENTIONS
    from train.optimizers import OPTIMIZERS
    from train.schedules import SCHEDULES

    rows = dict(re.findall(r"^\| (`[a-z`, ]+) \| (.+) \|$", README, flags=re.MULTILINE))
    expected = {
        "`corpus`": {*CORPORA, *yaml_choices("corpus")},
        "`tokenizer`": {*TOKENIZERS, *yaml_choices("tokenizer")},
        "`packing`": set(yaml_choices("packing")),
        "`model`": set(yaml_choices("model")),
        "`attention`": set(ATTENTIONS),
        "`optimizer`, `schedule`": {*OPTIMIZERS, *SCHEDULES},
        "`experiment`": set(EXPERIMENTS),
        "`debug`": set(yaml_choices("debug")),
    }
    for group, choices in expected.items():
        for choice in choices:
            assert f"`{choice}`" in rows[group], (group, choice)


def test_the_readmes_kinds_are_all_there_are():
    from models.attention import ATTENTIONS
    from models.decoder import NormPlace
    from models.feed_forwards import FEED_FORWARDS
    from models.norms import NORMS
    from models.positions import POSITIONS

    axes = {
        "attention": ATTENTIONS,
        "model.position": POSITIONS,
        "model.norm": NORMS,
        "model.norm_place": [place.value for place in NormPlace],
        "model.feed_forward": FEED_FORWARDS,
    }
    table = README.split("| setting | formula | paper |")[1].split("\n\n")[0]
    named = {}
    for line in table.splitlines()[2:]:
        axis, *values = re.findall(r"[a-z0-9_.]+", line.split(" | ")[0].replace("`", ""))
        named.setdefault(axis, []).extend(values)
    assert list(named) == list(axes)
    for axis, kinds in axes.items():
        assert sorted(named[axis]) == sorted(kinds), f"README.md's table of kinds, {axis}"


def test_the_readmes_metrics_are_those_of_a_run(train, tmp_path):
    overrides = ["tracking.statistics=full", "corpus.unit=paragraphs", "packing.context=256"]
    overrides.append("attention=off_by_one")
    assert train(*overrides, "model.num_layers=3") == 0
    logged = set(pd.read_csv(tmp_path / "run" / "metrics.csv").columns)
    table = README.split("| name | formula | paper |")[1].split("\n\n")[0]
    first_cells = " ".join(line.split(" | ")[0] for line in table.splitlines())
    named = re.findall(r"`([a-z0-9_]+/[a-z0-9_/.]+)`", first_cells)
    # No triggers in text, no known peak of a CPU.
    elsewhere = {"perf/mfu", "backcopy/non_trigger_mass", "backcopy/trigger_mass"}
    assert len(named) > 25
    for name in set(named) - elsewhere:
        prefix = name.removesuffix("...")
        assert any(column.startswith(prefix) for column in logged), name


def test_the_readmes_pictures_are_there():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert pictures and all((ROOT / picture).exists() for picture in pictures)
    assert "@@" not in README
