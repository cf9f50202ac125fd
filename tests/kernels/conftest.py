"""Attention cases, and what attention with statistics means, written out query by query.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim, R buckets of relative distance.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels.attention import sink_attention
from kernels.masks import DenseMask, IntervalMask


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The tensors here are too small to share: threads would spend their time on each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


PACKED = [
    [1] * 9 + [2] + [3] + [4] + [5] * 30 + [6] * 28,
    [1] * 66 + [2] * 1 + [-1] * 3,
]
"""Two rows of 70 tokens: documents of one token in a row, one over a block's edge, padding."""

PINNED = [[0, *row[1:]] for row in PACKED]


def _documents(rows, **settings) -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor(rows), **settings)


def _any_intervals(pinned: int = 0) -> IntervalMask:
    """Intervals at random: later keys alone, the pinned key alone, nothing; none monotone."""
    generator = torch.Generator().manual_seed(3)
    ends_2BT = torch.randint(0, 71, (2, 2, 70), generator=generator, dtype=torch.int32)
    start_BT, stop_BT = ends_2BT.amin(0), ends_2BT.amax(0)
    start_BT[:, ::7] = stop_BT[:, ::7] = 0
    start_BT[:, ::9] = stop_BT[:, ::9] = 20
    return IntervalMask(
        start_BT=start_BT,
        stop_BT=stop_BT,
        document_start_BT=torch.arange(70, dtype=torch.int32).repeat(2, 1) // 5 * 5,
        pinned=pinned,
    )


def _holes() -> DenseMask:
    """Bidirectional holes, a key that only itself sees, a hidden key and an empty row."""
    generator = torch.Generator().manual_seed(4)
    visible_BTS = torch.rand(2, 13, 13, generator=generator) < 0.6
    visible_BTS[:, :, 3] = False
    visible_BTS[0, 5], visible_BTS[0, 5, 5] = False, True
    visible_BTS[1, 2] = False
    document_start_BT = torch.arange(13, dtype=torch.int32).repeat(2, 1) // 4 * 4
    return DenseMask(visible_BTS=visible_BTS, document_start_BT=document_start_BT)


@dataclass
class Case:
    """One attention problem: a mask, head counts, head dims and what is added to the scores."""

    mask: IntervalMask | DenseMask
    H: int = 2
    G: int = 2
    D: int = 8
    E: int = 8
    null: str = ""
    slopes: bool = False
    buckets: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves with gradients, by argument name; scores of a few units, so P is far from flat."""
        generator = torch.Generator().manual_seed(0)
        B, T = self.mask.document_start_BT.shape
        shapes = {
            "q_BTHD": (B, T, self.H, self.D),
            "k_BTGD": (B, T, self.G, self.D),
            "v_BTGE": (B, T, self.G, self.E),
        }
        if self.null:
            shapes["null_logit"] = {"H": (self.H,), "BHT": (B, self.H, T)}[self.null]
        if self.slopes:
            shapes["slopes_H"] = (self.H,)
        if self.buckets:
            shapes["bias_HR"] = (self.H, self.buckets)
        leaves = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        leaves["q_BTHD"] *= 2
        return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}


INTERVAL_CASES = {
    "causal-T63": Case(IntervalMask.causal(2, 63)),
    "causal-T1": Case(IntervalMask.causal(3, 1)),
    "causal-T111-D96-E24-grouped": Case(IntervalMask.causal(1, 111), H=4, G=2, D=96, E=24),
    "causal-T130-one_group": Case(IntervalMask.causal(1, 130), H=3, G=1),
    "causal-D24-E5": Case(IntervalMask.causal(2, 17), D=24, E=5),
    "causal-null_H": Case(IntervalMask.causal(2, 70), null="H"),
    "causal-null_BHT-grouped": Case(IntervalMask.causal(2, 70), H=4, G=2, null="BHT"),
    "causal_across": Case(_documents(PACKED, causal_across=True)),
    "documents": Case(_documents(PACKED)),
    "documents-grouped-D96": Case(_documents(PACKED), H=4, G=2, D=96),
    "documents-null_BHT": Case(_documents(PACKED), null="BHT"),
    "pinned": Case(_documents(PINNED, pinned=1)),
    "pinned-null_H": Case(_documents(PINNED, pinned=1), null="H"),
    "window-hides_key_0": Case(IntervalMask.causal(1, 150).window(5)),
    "window-documents-null_H": Case(_documents(PACKED).window(7), null="H"),
    "window-pinned": Case(_documents(PINNED, pinned=1).window(6)),
    "prefix": Case(IntervalMask.causal(1, 70).prefix(66)),
    "prefix-documents": Case(_documents(PACKED).prefix(4)),
    "padding_row-null_BHT": Case(_documents([[1] * 5, [-1] * 5]), null="BHT"),
    "any_intervals": Case(_any_intervals()),
    "any_intervals-pinned-null_BHT": Case(_any_intervals(pinned=1), null="BHT"),
}

REFERENCE_CASES = {
    "holes": Case(_holes()),
    "holes-null_BHT-grouped": Case(_holes(), H=4, G=2, null="BHT"),
    "slopes": Case(_documents(PACKED), slopes=True, null="H"),
    "bias": Case(IntervalMask.causal(1, 140), buckets=32),
    "bias-slopes-holes": Case(_holes(), buckets=5, slopes=True),
}


@pytest.fixture(params=INTERVAL_CASES)
def interval_case(request) -> Case:
    return INTERVAL_CASES[request.param]


@pytest.fixture(params=INTERVAL_CASES | REFERENCE_CASES)
def any_case(request) -> Case:
    return (INTERVAL_CASES | REFERENCE_CASES)[request.param]


def _sees(mask: IntervalMask | DenseMask, b: int, i: int, j: int) -> bool:
    if isinstance(mask, DenseMask):
        return bool(mask.visible_BTS[b, i, j])
    start, stop = int(mask.start_BT[b, i]), int(mask.stop_BT[b, i])
    return j < stop and (j < mask.pinned or j >= start)


def _bucket(distance: int, num_buckets: int) -> int:
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(128 / exact)
    return min(num_buckets - 1, exact + int(share * (num_buckets - exact)))


def _by_definition(case: Case, tensors: dict[str, Tensor]) -> SimpleNamespace:
    """Output, lse and every statistic, each query's softmax on its own; differentiable."""
    q, k, v = tensors["q_BTHD"], tensors["k_BTGD"], tensors["v_BTGE"]
    null, slopes, bias = (tensors.get(name) for name in ("null_logit", "slopes_H", "bias_HR"))
    mask = case.mask
    B, T, H, D = q.shape
    out = {}
    lse = torch.full((B, H, T), -math.inf, dtype=q.dtype)
    first, document, null_mass, entropy = (torch.zeros(B, H, T, dtype=q.dtype) for _ in range(4))
    key_mass = torch.zeros(B, H, T, dtype=q.dtype)
    max_logit = torch.full((B, H), -math.inf, dtype=q.dtype)
    lse_rows = []
    k_of, v_of = ({(b, g): x[b, :, g] for b in range(B) for g in range(case.G)} for x in (k, v))
    q_of = {(b, h): q[b, :, h].unbind(0) for b in range(B) for h in range(H)}
    for b in range(B):
        for i in range(T):
            keys = [j for j in range(T) if _sees(mask, b, i, j)]
            index = torch.tensor(keys)
            document_start = int(mask.document_start_BT[b, i])
            for h in range(H):
                out[b, i, h] = torch.zeros(case.E, dtype=q.dtype)
                if not keys:
                    continue
                g = h // (H // case.G)
                scores = k_of[b, g][index] @ q_of[b, h][i] / math.sqrt(D)
                if slopes is not None:
                    scores = scores - slopes[h] * (i - index)
                if bias is not None:
                    scores = scores + bias[h, [_bucket(i - j, case.buckets) for j in keys]]
                slots = scores
                if null is not None:
                    slots = torch.cat(
                        [scores, (null[h] if null.ndim == 1 else null[b, h, i])[None]]
                    )
                shift = slots.max().detach()
                weights = torch.exp(slots - shift)
                p = weights / weights.sum()
                out[b, i, h] = p[: len(keys)] @ v_of[b, g][index]
                lse_rows.append(((b, h, i), shift + torch.log(weights.sum())))

                p = p.detach()
                entropy[b, h, i] = -(p * p.log()).sum()
                key_mass[b, h, keys] += p[: len(keys)]
                max_logit[b, h] = max(max_logit[b, h], scores.detach().max())
                if 0 in keys:
                    first[b, h, i] = p[keys.index(0)]
                if document_start in keys:
                    document[b, h, i] = p[keys.index(document_start)]
                if null is not None:
                    null_mass[b, h, i] = p[-1]
    if lse_rows:
        index, values = zip(*lse_rows, strict=True)
        lse = lse.index_put(tuple(torch.tensor(index).T), torch.stack(values))
    rows = [out[b, i, h] for b in range(B) for i in range(T) for h in range(H)]
    return SimpleNamespace(
        out=torch.stack(rows).view(B, T, H, case.E),
        lse=lse,
        first_mass_BHT=first,
        document_mass_BHT=document,
        null_mass_BHT=null_mass if null is not None else None,
        key_mass_BHS=key_mass,
        max_logit_BH=max_logit,
        entropy_BHT=entropy,
    )


def _gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], through: str) -> list[Tensor]:
    """Gradients of a weighted sum of out, of lse (non-empty rows), or of both."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    lse_weight = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    loss = 0
    if through != "lse":
        loss = loss + (out * weight).sum()
    if through != "out":
        loss = loss + (lse.masked_fill(lse == -math.inf, 0) * lse_weight).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def _run(case: Case, dtype: torch.dtype, through: str = "both", tap: bool = False, **settings):
    """``sink_attention`` on a case: everything it gives, gradients by argument name included."""
    tensors = case.tensors(dtype)
    leaves = dict(tensors)
    if tap:
        B, T = case.mask.document_start_BT.shape
        tap_BHS = torch.zeros(B, case.H, T, dtype=dtype, requires_grad=True)
        leaves["key_mass_tap_BHS"] = tensors["key_mass_tap_BHS"] = tap_BHS
    arguments = dict(tensors)
    positional = [arguments.pop(name) for name in ("q_BTHD", "k_BTGD", "v_BTGE")]
    output = sink_attention(*positional, case.mask, **arguments, **settings)
    gradients = _gradients(output.out_BTHE, output.lse_BHT, list(leaves.values()), through)
    return output, dict(zip(leaves, gradients, strict=True))


@pytest.fixture
def by_definition():
    return _by_definition


@pytest.fixture
def gradients():
    return _gradients


@pytest.fixture
def run_case():
    return _run


@pytest.fixture
def case_of():
    return Case
