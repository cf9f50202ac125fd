"""The reference against the definition, in fp64: output, lse, every gradient, every statistic."""

import math

import pytest
import torch

from kernels.attention import sink_attention
from kernels.attention.reference import relative_bucket
from kernels.masks import IntervalMask

FP64 = {"rtol": 0, "atol": 1e-10}


def test_everything_agrees_with_the_definition(any_case, by_definition, gradients, run_case):
    expected_inputs = any_case.tensors(torch.float64)
    expected = by_definition(any_case, expected_inputs)
    expected_gradients = gradients(
        expected.out, expected.lse, list(expected_inputs.values()), "both"
    )

    output, ours = run_case(any_case, torch.float64, statistics="full", implementation="reference")

    torch.testing.assert_close(output.out_BTHE, expected.out, **FP64)
    torch.testing.assert_close(output.lse_BHT, expected.lse, **FP64)
    for name, value in output.statistics._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), **FP64, msg=name)
    for (name, gradient), wanted in zip(ours.items(), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, **FP64, msg=name)


def test_mass_adds_up_to_the_non_empty_queries(any_case, run_case):
    output, _ = run_case(any_case, torch.float64, implementation="reference")
    statistics = output.statistics
    total_BH = statistics.key_mass_BHS.sum(-1)
    if statistics.null_mass_BHT is not None:
        total_BH = total_BH + statistics.null_mass_BHT.sum(-1)
    queries_B1 = (any_case.mask.keys_per_query_BT() > 0).sum(1, keepdim=True)
    torch.testing.assert_close(total_BH, queries_B1.expand_as(total_BH).double(), **FP64)


def test_an_empty_row_gives_nothing_even_with_a_null_slot(case_of, run_case):
    case = case_of(
        IntervalMask.from_documents(torch.tensor([[1, 1, -1], [-1, -1, -1]])), null="BHT"
    )
    output, gradients = run_case(case, torch.float64, statistics="full", implementation="reference")
    statistics = output.statistics
    assert output.out_BTHE[0, 2].eq(0).all() and output.out_BTHE[1].eq(0).all()
    assert output.lse_BHT[0, :, 2].eq(-math.inf).all() and output.lse_BHT[1].eq(-math.inf).all()
    assert gradients["null_logit"][0, :, 2].eq(0).all()
    assert gradients["null_logit"][0, :, :2].ne(0).all()
    assert gradients["q_BTHD"][1].eq(0).all()
    for name in ("first_mass_BHT", "document_mass_BHT", "null_mass_BHT", "entropy_BHT"):
        assert getattr(statistics, name)[0, :, 2].eq(0).all(), name
        assert getattr(statistics, name)[1].eq(0).all(), name
    assert statistics.max_logit_BH[1].eq(-math.inf).all()


def test_gradcheck(case_of):
    mask = IntervalMask.from_documents(torch.tensor([[0, 1, 1, 2, -1]]), pinned=1).prefix(2)
    case = case_of(mask, H=2, G=1, D=3, E=2, null="BHT", slopes=True, buckets=2)
    tensors = case.tensors(torch.float64)
    names = list(tensors)[3:]

    def attend(q, k, v, *extras):
        extras = dict(zip(names, extras, strict=True))
        output = sink_attention(q, k, v, mask, implementation="reference", **extras)
        return output.out_BTHE, output.lse_BHT[..., :-1]

    assert torch.autograd.gradcheck(attend, list(tensors.values()))


def test_probabilities_are_the_attention_matrix(case_of, run_case):
    case = case_of(IntervalMask.causal(1, 9), H=4, G=2, null="H")
    output, _ = run_case(case, torch.float64, implementation="reference")
    p_BHTS = output.probabilities_BHTS
    v_BHSE = case.tensors(torch.float64)["v_BTGE"].transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close((p_BHTS @ v_BHSE).transpose(1, 2), output.out_BTHE, **FP64)
    torch.testing.assert_close(p_BHTS.sum(2), output.statistics.key_mass_BHS, **FP64)
    torch.testing.assert_close(1 - p_BHTS.sum(3), output.statistics.null_mass_BHT, **FP64)


@pytest.mark.parametrize("num_buckets", [2, 7, 32, 128])
def test_buckets_are_those_of_t5(num_buckets):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-5, 300)
    expected = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=num_buckets, max_distance=128
    )
    assert torch.equal(relative_bucket(distance, num_buckets), expected)


def test_bf16_inputs_are_computed_in_fp32(case_of, run_case):
    case = case_of(IntervalMask.causal(1, 20), null="H")
    tensors = {name: x.detach() for name, x in case.tensors(torch.bfloat16).items()}
    output = sink_attention(
        *list(tensors.values())[:3], case.mask, null_logit=tensors["null_logit"]
    )
    exact = sink_attention(
        *[x.float() for x in list(tensors.values())[:3]],
        case.mask,
        null_logit=tensors["null_logit"].float(),
        implementation="reference",
    )
    assert output.out_BTHE.dtype == torch.bfloat16
    assert torch.equal(output.out_BTHE, exact.out_BTHE.bfloat16())
    assert torch.equal(output.lse_BHT, exact.lse_BHT)
    for ours, wanted in zip(output.statistics[:5], exact.statistics[:5], strict=True):
        assert torch.equal(ours, wanted)
