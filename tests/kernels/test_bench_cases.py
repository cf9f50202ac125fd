"""What the benchmark times: documents, shapes, arithmetic, who takes part, second passes.

Axes: B rows of the batch, T query positions, S key positions, H query heads.
"""

import itertools

import pytest
import torch

from kernels.attention import sink_attention
from kernels.bench import alternatives
from kernels.bench.backends import _document_bounds, block_mask
from kernels.bench.cases import MASKS, document_ids_BT, make_problem, select_cases
from kernels.bench.claims import CUDNN_TARGETS
from kernels.bench.contender import repeat_groups
from kernels.bench.contenders import CONTENDERS, taking_part
from tests.kernels.benched import CPU, OURS, small


def test_documents_are_the_same_every_time_and_fill_their_rows():
    ids_BT = document_ids_BT(4, 2048)
    assert torch.equal(ids_BT, document_ids_BT(4, 2048))
    assert ids_BT.shape == (4, 2048) and ids_BT.dtype == torch.int32
    flat = ids_BT.flatten()
    steps = flat[1:] - flat[:-1]
    assert flat[0] == 1 and set(steps.tolist()) == {0, 1}
    # A document that a row's end cuts goes on in the next row, by a mask of its own.
    assert (ids_BT[1:, 0] == ids_BT[:-1, -1]).any()


def test_document_lengths_are_those_of_web_text():
    _, counts = torch.unique(document_ids_BT(64, 16384), return_counts=True)
    assert 350 < counts.median() < 450
    assert 700 < counts.double().mean() < 950
    assert counts.max() > 10_000


@pytest.mark.parametrize("mask", MASKS)
def test_arithmetic_is_what_the_mask_shows(mask):
    case = small(mask, groups=2, length=300)
    problem = make_problem(case, CPU)
    pairs = sum(row.sum().item() for row in problem.mask.dense_BTS())
    assert problem.pairs == pairs
    if mask == "causal":
        assert pairs == 2 * 300 * 301 // 2
    # Two products of two FLOPs a pair and feature, for each of four heads.
    assert problem.forward_flops == 2 * 2 * pairs * 4 * 16
    assert problem.total_flops == 3.5 * problem.forward_flops
    inputs = problem.inputs(0)
    sizes = [tensor.numel() * tensor.element_size() for tensor in inputs[:3]]
    assert problem.input_bytes == sum(sizes)


def test_inputs_are_seeded_and_have_a_sink():
    problem = make_problem(small(length=256), CPU)
    first, again, other = problem.inputs(0), problem.inputs(0), problem.inputs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.q_BTHD, other.q_BTHD)
    assert {tensor.dtype for tensor in first} == {torch.bfloat16}
    output = sink_attention(*first[:3], problem.mask, implementation="reference")
    assert output.statistics.first_mass_BHT[:, :, -1].mean() > 0.1


def test_the_record_begins_with_the_shapes_of_the_claims_and_has_every_length():
    cases = select_cases("record", [], None, 0, "bf16")
    assert [case.shape for case in cases[:4]] == [*CUDNN_TARGETS, (16, 12, 2048, 96)]
    grid = {(case.length, case.head_dim, case.mask) for case in cases}
    lengths = {512, 1024, 2048, 4096, 8192, 16384}
    assert grid == {(n, d, m) for n in lengths for d in (64, 96, 128) for m in MASKS}
    assert len(set(cases)) == len(cases)
    tokens = {(case.head_dim, case.batch * case.length) for case in cases}
    assert tokens == {(64, 65536), (96, 32768), (128, 32768)}


def test_a_shape_by_hand_takes_the_place_of_the_preset():
    cases = select_cases("quick", ["4,6,64,32"], None, 2, "fp16")
    assert [(case.shape, case.mask) for case in cases] == [((4, 6, 64, 32), m) for m in MASKS]
    assert {case.num_groups for case in cases} == {2} and cases[0].dtype == "fp16"
    assert cases[0].label == "4,6,64,32 G2 causal"


def test_backends_without_document_masks_stay_out_of_them():
    def names(mask, **changes):
        return {one.name for one in taking_part(small(mask, **changes), [])}

    assert names("causal") == set(CONTENDERS) - {"flash_varlen"}
    assert names("documents") == set(CONTENDERS) - {"cudnn", "flash"}
    assert names("causal", alternatives=False) == {*OURS, "cudnn", "flash", "flex"}
    named = taking_part(small(alternatives=False), ["second_pass", "sinklab"])
    assert [one.name for one in named] == ["sinklab", "second_pass"]


def test_document_bounds_for_flash():
    problem = make_problem(small("documents", length=1024), CPU)
    bounds, longest = _document_bounds(problem)
    assert bounds[0] == 0 and bounds[-1] == 2048 and 1024 in bounds
    assert bounds == sorted(set(bounds))
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert longest == max(lengths)
    # Each document shows a triangle.
    assert problem.pairs == sum(n * (n + 1) // 2 for n in lengths)


# Second pass: the mathematics behind the baselines


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
# FlexAttention warns that it runs uncompiled.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_second_passes_measure_the_statistics(mask, groups):
    problem = make_problem(small(mask, groups=groups), CPU)
    inputs = [tensor.float() for tensor in problem.inputs(0)[:3]]
    expected = sink_attention(*inputs, problem.mask, implementation="reference")
    q, k = inputs[0].transpose(1, 2), repeat_groups(inputs[1].transpose(1, 2), 4)
    starts = None if mask == "causal" else problem.mask.document_start_BT
    found = alternatives.named_masses(q, k, expected.lse_BHT, starts, problem.scale)
    key_major = block_mask(problem, key_major=True)
    found["key_mass_BHS"] = alternatives.key_mass_by_flex(
        q, k, expected.lse_BHT, key_major, problem.scale
    )
    if mask == "causal":
        halves = [
            alternatives.chunk_statistics(
                q[:, :, start : start + 64],
                k[:, :, : start + 64],
                expected.lse_BHT[:, :, start : start + 64],
                start,
                problem.scale,
            )
            for start in (0, 64)
        ]
        found["max_logit_BH"] = torch.stack([largest for _, largest in halves]).amax(0)
        by_chunks = halves[1][0]
        by_chunks[:, :, :64] += halves[0][0]
        torch.testing.assert_close(by_chunks, expected.statistics.key_mass_BHS)
    for name, value in found.items():
        torch.testing.assert_close(value, getattr(expected.statistics, name))
