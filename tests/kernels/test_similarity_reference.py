"""The reference against the formula, in fp64: output, every gradient, every statistic."""

import pytest
import torch

from kernels.masks import DenseMask, IntervalMask
from kernels.similarity import similarity_attention
from tests.kernels.cases import Case
from tests.kernels.interpreted import documents
from tests.kernels.similarity_runs import KINDS, by_definition, gradients, run, tensors

FP64 = {"rtol": 0, "atol": 1e-10}


def holes() -> DenseMask:
    """A key that only itself sees, a hidden key and an empty row."""
    visible_BTS = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(4)) < 0.6
    visible_BTS[:, :, 3] = False
    visible_BTS[0, 5], visible_BTS[0, 5, 5] = False, True
    visible_BTS[0, 2] = False
    document_start_BT = torch.arange(9, dtype=torch.int32)[None] // 4 * 4
    return DenseMask(visible_BTS=visible_BTS, document_start_BT=document_start_BT)


CASES = {
    "causal-grouped-bias": Case(IntervalMask.causal(1, 9), H=4, G=2, E=4, bias=0.75),
    "documents-padding": Case(
        IntervalMask.from_documents(torch.tensor([[1] * 4 + [2] + [3] * 3 + [-1] * 2]))
    ),
    "pinned-window-slopes": Case(documents(5, 1, 6, pinned=1).window(3), slopes=True),
    "holes": Case(holes(), H=2, G=1),
}


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_everything_agrees_with_the_formula(case, kind):
    case = CASES[case]
    leaves = tensors(case, kind, torch.float64)
    expected = by_definition(case, kind, leaves)
    wanted_gradients = gradients(expected.out, list(leaves.values()))
    for tap in (False, True):
        output, ours = run(case, kind, torch.float64, tap, statistics="full")
        torch.testing.assert_close(output.out_BTHE, expected.out, **FP64)
        torch.testing.assert_close(output.lse_BHT, expected.row_abs_sum, **FP64)
        key_mass_BHS = ours.pop("key_mass_tap_BHS") if tap else output.statistics.key_mass_BHS
        assert (output.statistics.key_mass_BHS is None) == tap
        statistics = output.statistics._replace(key_mass_BHS=key_mass_BHS)
        for name, value in statistics._asdict().items():
            torch.testing.assert_close(value, getattr(expected, name), **FP64, msg=name)
        for (name, gradient), wanted in zip(ours.items(), wanted_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, **FP64, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_gradcheck(kind):
    mask = IntervalMask.from_documents(torch.tensor([[0, 1, 1, 2, -1]]), pinned=1).prefix(2)
    leaves = tensors(Case(mask, H=2, G=1, D=3, E=2, slopes=True), kind, torch.float64)

    def attend(q, k, v, slopes):
        settings = {"similarity": kind[0], "normalize": kind[1], "slopes_H": slopes}
        return similarity_attention(q, k, v, mask, **settings).out_BTHE

    assert torch.autograd.gradcheck(attend, list(leaves.values()))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_probabilities_are_what_the_statistics_are_read_off(kind):
    output, _ = run(CASES["documents-padding"], kind, torch.float64)
    p_BHTS = output.probabilities_BHTS
    assert not p_BHTS.requires_grad
    torch.testing.assert_close(p_BHTS.sum(2), output.statistics.key_mass_BHS, **FP64)
    # P of a row adds up to 1 where the row has weights.
    torch.testing.assert_close(p_BHTS.sum(3), (output.lse_BHT > 0).double(), **FP64)
    torch.testing.assert_close(p_BHTS[..., 0], output.statistics.first_mass_BHT, **FP64)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_bf16_inputs_are_computed_in_fp32(kind):
    case = Case(IntervalMask.causal(1, 9))
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        qkv = [x.detach().bfloat16().to(dtype) for x in tensors(case, kind, dtype).values()]
        settings = {"similarity": kind[0], "normalize": kind[1], "statistics": "full"}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            outputs.append(similarity_attention(*qkv, case.mask, **settings))
    exact, ours = outputs
    assert torch.equal(ours.out_BTHE, exact.out_BTHE.bfloat16())
    assert torch.equal(ours.row_abs_sum_BHT, exact.row_abs_sum_BHT)
    for value, wanted in zip(ours.statistics, exact.statistics, strict=True):
        assert (value is None and wanted is None) or torch.equal(value, wanted)
