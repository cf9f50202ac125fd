"""Norm ratios against loops over the tokens."""

import math
import statistics

import pytest
import torch

from kernels.attention import Statistics
from kernels.masks import IntervalMask
from models.batch import PackedBatch
from models.decoder import LayerRecord
from train.step_metrics import ORDINARY_OFFSET, StepPart, norm_ratios, step_norms

LENGTHS = ((40, 80, 8), (100, 28))
"""Documents of two rows of 128 tokens."""


def part(seed: int) -> tuple[StepPart, tuple[LayerRecord, ...]]:
    """A micro-batch of two layers with norms of chance, and its records."""
    generator = torch.Generator().manual_seed(seed)
    ids = [[i for i, n in enumerate(row, start=1) for _ in range(n)] for row in LENGTHS]
    document_BT = torch.tensor(ids, dtype=torch.int32)
    batch = PackedBatch.of_prompts(torch.zeros(2, 128, dtype=torch.int64))
    batch.mask = IntervalMask.from_documents(document_BT)
    layers = tuple(
        LayerRecord(
            statistics=Statistics(*[None] * 6),
            hidden_norm_BT=torch.rand(2, 128, generator=generator),
            value_BTGE=torch.rand(2, 128, 3, 4, generator=generator),
            probabilities_BHTS=None,
        )
        for _ in range(2)
    )
    return StepPart([], [], step_norms(layers), batch), layers


def test_ratios_are_those_of_loops_over_tokens():
    parts, records = zip(*(part(seed) for seed in (0, 1)), strict=True)
    found = norm_ratios(list(parts))
    for layer in range(2):
        for name in ("massive_ratio", "value_ratio"):
            first, ordinary, of_rows, ordinary_of_rows = [], [], [], []
            for layers in records:
                record = layers[layer]
                norm_BT = record.hidden_norm_BT
                if name == "value_ratio":
                    norm_BT = record.value_BTGE.square().sum(-1).sqrt().mean(-1)
                for lengths, norm_T in zip(LENGTHS, norm_BT.tolist(), strict=True):
                    of_rows.append(norm_T[0])
                    ordinary_of_rows += norm_T[ORDINARY_OFFSET:]
                    start = 0
                    for length in lengths:
                        if length >= 64:
                            first.append(norm_T[start])
                            ordinary += norm_T[start + ORDINARY_OFFSET : start + length]
                        start += length
            key = f"{name}/layer_{layer:02d}"
            wanted = statistics.mean(first) / statistics.median_low(ordinary)
            assert found[f"norm/{key}"] == pytest.approx(wanted, rel=1e-5)
            wanted = statistics.mean(of_rows) / statistics.median_low(ordinary_of_rows)
            assert found[f"norm_first/{key}"] == pytest.approx(wanted, rel=1e-5)
    assert len(found) == 8


@pytest.mark.parametrize("place", [40, 60])
def test_a_norm_that_is_no_number_makes_its_ratios_none(place):
    """That of a document's first token, which the row has for an ordinary one, or of another."""
    made, _ = part(0)
    made.norms["massive_ratio"][0, place, 1] = float("nan")
    found = norm_ratios([made])
    lost = {name for name, ratio in found.items() if math.isnan(ratio)}
    assert lost == {f"{prefix}/massive_ratio/layer_01" for prefix in ("norm", "norm_first")}


def test_a_step_without_a_long_document_has_the_rows_ratios_alone():
    made, _ = part(0)
    made.batch.mask = IntervalMask.from_documents(torch.arange(1, 129).repeat(2, 1).int())
    found = norm_ratios([made])
    assert {name.split("/")[0] for name in found} == {"norm_first"}
