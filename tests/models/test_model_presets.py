"""The presets of conf/model: what they set, and that their stated parameter counts are true."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from models.attention import SoftmaxAttention
from models.decoder import Decoder, DecoderConfig

FOLDER = Path(__file__).parents[2] / "conf" / "model"
VOCABULARY_AND_COUNTS = {
    "backcopy": (85, 41_152, 16_384),
    "cpu": (1024, 803_968, 131_072),
    "minutes": (8192, 14_162_304, 3_145_728),
    "gu60m": (50_432, 58_998_528, 77_463_552),
    "barbero120m": (32_000, 70_798_080, 49_152_000),
    "1b": (50_432, 1_130_457_088, 206_569_472),
}


def load(name):
    values = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert values.pop("defaults") == ["base", "_self_"]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), values))


def test_every_preset_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(VOCABULARY_AND_COUNTS)


@pytest.mark.parametrize("name", VOCABULARY_AND_COUNTS)
def test_parameter_counts_are_those_that_the_preset_states(name):
    vocab_size, non_embedding, embedding = VOCABULARY_AND_COUNTS[name]
    with torch.device("meta"):
        decoder = Decoder(load(name), SoftmaxAttention.Config(), vocab_size)
    assert decoder.num_parameters() == (non_embedding + embedding, non_embedding)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"# Parameters: {non_embedding:,} + {embedding:,} of" in text


def test_the_paper_models_have_the_papers_heads():
    assert load("gu60m").resolved_head_dim == 96
    assert load("1b").resolved_head_dim == 128
    assert load("barbero120m").resolved_head_dim == 64
