"""Attention cases, and what attention with statistics means, written out query by query.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim, R buckets of relative distance.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.attention import api, sink_attention
from kernels.attention.fused.tiles import Tile, Warpgroups, override_tiles
from kernels.masks import DenseMask, IntervalMask


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The tensors here are too small to share: threads would spend their time on each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session", autouse=True)
def _patch_triton_once():
    """Triton's interpreter patches ``triton.language`` anew for every call of a device function,
    which takes half of its time; here it is patched once.
    """
    if not (api._HAS_TRITON and api._INTERPRETED):
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

    def patch_once(function):
        globals_ = function.__globals__.values()
        modules = tuple(m in globals_ for m in (language, language.core))
        if modules not in scopes:
            scopes[modules] = patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


PACKED = [
    [1] * 9 + [2] + [3] + [4] + [5] * 30 + [6] * 28,
    [1] * 66 + [2] * 1 + [-1] * 3,
]
"""Two rows of 70 tokens: documents of one token in a row, one over a block's edge, padding."""

PINNED = [[0, *row[1:]] for row in PACKED]


def _documents(rows, **settings) -> IntervalMask:
    return IntervalMask.from_documents(torch.tensor(rows), **settings)


def _any_intervals(pinned: int = 0, T: int = 70, seed: int = 3) -> IntervalMask:
    """Intervals at random: later keys alone, the pinned key alone, nothing; none monotone."""
    generator = torch.Generator().manual_seed(seed)
    ends_2BT = torch.randint(0, T + 1, (2, 2, T), generator=generator, dtype=torch.int32)
    start_BT, stop_BT = ends_2BT.amin(0), ends_2BT.amax(0)
    start_BT[:, ::7] = stop_BT[:, ::7] = 0
    start_BT[:, ::9] = stop_BT[:, ::9] = 20
    return IntervalMask(
        start_BT=start_BT,
        stop_BT=stop_BT,
        document_start_BT=torch.arange(T, dtype=torch.int32).repeat(2, 1) // 5 * 5,
        pinned=pinned,
    )


def _long_rows(B: int, T: int, **settings) -> IntervalMask:
    """Packed rows of documents of 1, ..., T // 2 tokens, most of them short, and some padding."""
    generator = torch.Generator().manual_seed(5)
    log_lengths_BN = torch.rand(B, T, generator=generator) * math.log(T / 2)
    rows = []
    for lengths in log_lengths_BN.exp().long().tolist():
        row = [n for n, length in enumerate(lengths, 1) for _ in range(length)][: T - 9]
        rows.append(row + [-1] * 9)
        if settings.get("pinned"):
            rows[-1][0] = 0
    return _documents(rows, **settings)


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
        """Leaves with gradients, by argument name; scores of a few units, so P is far from flat.

        The numbers are multiples of 1/16 below 16, so that every dtype holds them exactly: results
        in two dtypes differ by what was computed, not by what was put in.
        """
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
        if self.slopes:
            leaves["slopes_H"] /= 4
        return {
            name: (leaf * 16).round().div(16).to(dtype).requires_grad_()
            for name, leaf in leaves.items()
        }


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


class GpuCase(NamedTuple):
    """A case of real size; tiles by kernel name, the table's where none is given."""

    name: str
    dtype: torch.dtype
    case: Case
    tiles: dict[str, Tile | Warpgroups]


def _hopper(groups: int, rows: int) -> dict[str, Warpgroups]:
    """Hopper's kernels: one warpgroup a program, products left in flight, or as many as fit."""
    overlap = groups == 1
    return {
        "forward": Warpgroups(groups=groups, rows=rows, stages=2),
        "query": Warpgroups(groups=groups, rows=64, stages=2, overlap=overlap),
        "key": Warpgroups(groups=min(groups, 2), rows=64, stages=2, overlap=overlap),
    }


PORTABLE = {
    "forward": Tile(queries=128, keys=64, warps=8, stages=2),
    "query": Tile(queries=128, keys=64, warps=8, stages=2),
    "key": Tile(queries=64, keys=128, warps=8, stages=2),
    "key_mass": Tile(queries=64, keys=128, warps=8, stages=2),
}


def _gpu_cases() -> list[GpuCase]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    causal_D64 = Case(IntervalMask.causal(2, 1024), 4, 4, 64, 64)
    causal_D96 = Case(IntervalMask.causal(2, 1000), 6, 2, 96, 96)
    causal_D128 = Case(IntervalMask.causal(2, 2048), 4, 2, 128, 128)
    causal_D256 = Case(IntervalMask.causal(1, 1024), 4, 4, 256, 256)
    short_D256 = Case(IntervalMask.causal(1, 512), 4, 4, 256, 256, null="H")
    documents_D64 = Case(_long_rows(2, 1024), 4, 4, 64, 64)
    documents_null = Case(_long_rows(2, 1024), 4, 4, 64, 64, null="BHT")
    documents_slopes = Case(_long_rows(2, 1000), 4, 4, 80, 48, slopes=True)
    pinned_D128 = Case(_long_rows(2, 1024, pinned=1).window(100), 4, 4, 128, 128, null="H")
    any_D16 = Case(_any_intervals(pinned=1, T=1024), 4, 2, 16, 256)
    any_D64 = Case(_any_intervals(pinned=1, T=1020), 4, 2, 64, 64)
    prefix_D24 = Case(IntervalMask.causal(2, 17).prefix(9), 4, 4, 24, 40)
    prefix_D96 = Case(IntervalMask.causal(2, 260).prefix(200), 4, 4, 96, 96)
    one, two, three = _hopper(1, 64), _hopper(2, 128), _hopper(3, 128)
    return [
        GpuCase("causal-D64", bf16, causal_D64, {}),
        GpuCase("causal-D64-portable", bf16, causal_D64, PORTABLE),
        GpuCase("causal-D64-hopper_3", bf16, causal_D64, three),
        GpuCase("causal-T1000-D96-grouped", bf16, causal_D96, {}),
        GpuCase("causal-T1000-D96-grouped-hopper_1", bf16, causal_D96, one),
        GpuCase("causal-T2048-D128-grouped-fp16-hopper_2", fp16, causal_D128, two),
        GpuCase("causal-D256-fp16", fp16, causal_D256, {}),
        GpuCase("causal-T512-D256-null_H-fp32", fp32, short_D256, {}),
        GpuCase("documents-D64-fp32", fp32, documents_D64, {}),
        GpuCase("documents-D64-null_BHT", bf16, documents_null, {}),
        GpuCase("documents-D64-null_BHT-hopper_1", bf16, documents_null, one),
        GpuCase("documents-T1000-D80-E48-slopes", bf16, documents_slopes, {}),
        GpuCase("pinned-window-D128-null_H", bf16, pinned_D128, {}),
        GpuCase("pinned-window-D128-null_H-hopper_1", bf16, pinned_D128, one),
        GpuCase("any_intervals-pinned-D16-E256", bf16, any_D16, {}),
        GpuCase("any_intervals-pinned-T1020-D64-fp16-hopper_3", fp16, any_D64, three),
        GpuCase("prefix-T17-D24-E40", bf16, prefix_D24, {}),
        GpuCase("prefix-T260-D96-hopper_2", bf16, prefix_D96, two),
    ]


GPU_CASES = {case.name: case for case in _gpu_cases()}
"""By name; each costs a GPU the compilation of three or four kernels. hopper_3: Hopper's kernels
with three warpgroups, whatever the table says; bf16 unless it says otherwise."""


@pytest.fixture(params=INTERVAL_CASES)
def interval_case(request) -> Case:
    return INTERVAL_CASES[request.param]


@pytest.fixture(scope="session")
def gpu_cases() -> dict[str, GpuCase]:
    """By name, those that the GPU at hand can run."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return {name: case for name, case in GPU_CASES.items() if hopper or "hopper" not in name}


@pytest.fixture(params=GPU_CASES)
def gpu_case(request, gpu_cases) -> GpuCase:
    """One of them, with its tiles in use."""
    if request.param not in gpu_cases:
        pytest.skip("needs a Hopper card")
    with override_tiles(**GPU_CASES[request.param].tiles):
        yield gpu_cases[request.param]


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

    def weighted_sum(x: Tensor) -> Tensor:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        # Exact in every dtype, as the inputs are.
        return (x * (weight * 16).round().div(16).to(x)).sum()

    of_out, of_lse = weighted_sum(out), weighted_sum(lse.masked_fill(lse == -math.inf, 0))
    loss = {"out": of_out, "lse": of_lse, "both": of_out + of_lse}[through]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def _run(
    case: Case,
    dtype: torch.dtype,
    through: str = "both",
    tap: bool = False,
    device: str = "cpu",
    **settings,
):
    """``sink_attention`` on a case: everything it gives, gradients by argument name included."""
    leaves = {
        name: leaf.detach().to(device).requires_grad_()
        for name, leaf in case.tensors(dtype).items()
    }
    arguments = dict(leaves)
    if settings.get("implementation") == "triton" and case.slopes:
        leaves.pop("slopes_H")
        arguments["slopes_H"] = arguments["slopes_H"].detach()
    if tap:
        B, T = case.mask.document_start_BT.shape
        tap_dtype = torch.promote_types(dtype, torch.float32)
        tap_BHS = torch.zeros(B, case.H, T, dtype=tap_dtype, device=device, requires_grad=True)
        leaves["key_mass_tap_BHS"] = arguments["key_mass_tap_BHS"] = tap_BHS
    positional = [arguments.pop(name) for name in ("q_BTHD", "k_BTGD", "v_BTGE")]
    output = sink_attention(*positional, case.mask.to(device), **arguments, **settings)
    gradients = _gradients(output.out_BTHE, output.lse_BHT, list(leaves.values()), through)
    return output, dict(zip(leaves, gradients, strict=True))


def _plain(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """out, and gradients through it, of attention as one would write it, all of it in ``dtype``."""
    leaves = {
        name: leaf.detach().to(device).requires_grad_()
        for name, leaf in case.tensors(dtype).items()
    }
    q_BHTD, k_BHSD, v_BHSE = (leaves[name].transpose(1, 2) for name in list(leaves)[:3])
    k_BHSD, v_BHSE = (x.repeat_interleave(case.H // case.G, dim=1) for x in (k_BHSD, v_BHSE))
    visible_B1TS = case.mask.dense_BTS()[:, None].to(device)
    logits_BHTS = (q_BHTD @ k_BHSD.mT) * case.D**-0.5
    if case.slopes:
        position_T = torch.arange(q_BHTD.shape[2], device=device)
        distance_TS = (position_T[:, None] - position_T).to(dtype)
        logits_BHTS = logits_BHTS - leaves["slopes_H"][:, None, None] * distance_TS
    logits_BHTS = logits_BHTS.masked_fill(~visible_B1TS, torch.finfo(dtype).min)
    if case.null:
        null_BHT = leaves["null_logit"]
        null_BHT = null_BHT[:, None] if case.null == "H" else null_BHT
        column_BHT1 = null_BHT.expand(logits_BHTS.shape[:3])[..., None]
        logits_BHTS = torch.cat([logits_BHTS, column_BHT1], dim=-1)
    weights_BHTS = torch.softmax(logits_BHTS, dim=-1)[..., : visible_B1TS.shape[-1]]
    weights_BHTS = weights_BHTS * visible_B1TS.any(-1, keepdim=True)
    out_BTHE = (weights_BHTS @ v_BHSE).transpose(1, 2)
    gradients = _gradients(out_BTHE, q_BHTD.new_zeros(1), list(leaves.values()), "out")
    return {"out": out_BTHE.detach(), **dict(zip(leaves, gradients, strict=True))}


def _assert_agrees(ours, exact, tolerance: float) -> None:
    """Two results of ``_run`` agree within ``tolerance`` of each tensor's largest value, or of 1.

    A gradient that ours lacks is not compared.
    """
    (output, gradients), (wanted, wanted_gradients) = ours, exact
    pairs = {"out": (output.out_BTHE, wanted.out_BTHE), "lse": (output.lse_BHT, wanted.lse_BHT)}
    assert (output.statistics is None) == (wanted.statistics is None)
    if wanted.statistics is not None:
        for name, expected in wanted.statistics._asdict().items():
            pairs[name] = (getattr(output.statistics, name), expected)
            assert (pairs[name][0] is None) == (expected is None), name
    pairs |= {name: (value, wanted_gradients[name]) for name, value in gradients.items()}
    for name, (value, expected) in pairs.items():
        if expected is None:
            continue
        largest = expected.detach().masked_fill(expected.isinf(), 0).abs().max().clamp(min=1)
        torch.testing.assert_close(
            value.double(),
            expected.double(),
            rtol=0,
            atol=tolerance * float(largest),
            msg=lambda message, name=name: f"{name}: {message}",
        )


def _assert_no_worse_than_plain(case: Case, dtype: torch.dtype, ours, exact, device="cpu") -> None:
    """out and its gradients err at most twice as much as attention written out in ``dtype``.

    ours, exact: results of ``_run`` through out, in ``dtype`` and in fp64.
    """
    plain = _plain(case, dtype, device)
    for name in ("out", *ours[1]):
        if name not in plain:
            continue
        value, wanted = (
            run[0].out_BTHE if name == "out" else run[1][name] for run in (ours, exact)
        )
        for norm in (2, math.inf):
            error, allowed = (
                torch.linalg.vector_norm(x.detach().double() - wanted.detach().double(), norm)
                for x in (value, plain[name])
            )
            floor = 1e-6 * torch.linalg.vector_norm(wanted.detach().double(), norm)
            assert error <= 2 * allowed + floor, (name, norm, float(error), float(allowed))


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


@pytest.fixture
def assert_agrees():
    return _assert_agrees


@pytest.fixture
def assert_no_worse_than_plain():
    return _assert_no_worse_than_plain
