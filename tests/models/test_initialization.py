"""Initial weights have the standard deviation that their initialisation states."""

import math

import pytest
import torch

from models.attention import SoftmaxAttention
from models.decoder import Decoder, DecoderConfig

D_MODEL, D_FF, LAYERS = 128, 192, 3


def expected_std(initialization, name, fan_in):
    if initialization == "gu":
        is_output = name.endswith("feed_forward.output.weight")
        return 1 / (math.sqrt(fan_in) * LAYERS) if is_output else math.sqrt(2 / (5 * fan_in))
    return 0.02 / math.sqrt(2 * LAYERS) if name.endswith("output.weight") else 0.02


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("initialization", ["gu", "normal"])
def test_standard_deviations(initialization, tied):
    torch.manual_seed(3)
    config = DecoderConfig(
        num_layers=LAYERS,
        d_model=D_MODEL,
        num_heads=4,
        d_ff=D_FF,
        tie_embeddings=tied,
        initialization=initialization,
    )
    decoder = Decoder(config, SoftmaxAttention.Config(), 512)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(1).all(), name
            continue
        expected = expected_std(initialization, name, parameter.shape[-1])
        # The standard error of a standard deviation is std / sqrt(2 n), here below 0.6 %.
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_the_seed_decides_the_weights(decoder_of):
    config = decoder_of().config
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(
            Decoder(config, SoftmaxAttention.Config(), 97).blocks[2].attention.key.weight
        )
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
