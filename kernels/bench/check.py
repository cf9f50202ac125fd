"""The gate: nothing is timed before it agrees with the reference in fp64 on the same inputs.

The whole call is made at its full size, on memory that holds NaN before it; of what comes out, the
first group of heads of the first row and the last of the last are compared with the reference,
which writes one head's attention matrix out at a time. The rule is flash-attention's: an error of
at most twice that of plain PyTorch at the same dtype (scores rounded to it, softmax in fp32). The
errors are relative, token by token: the gradients of a sink are hundreds of times those of other
keys, and would hide them. The largest and the mean must both hold, and mean masses be within
``MAX_MASS_ERROR``.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention import sink_attention
from kernels.bench.alternatives import read_off, written_out
from kernels.bench.cases import Inputs, Problem
from kernels.masks import IntervalMask

OUR_FACTOR = 2.0
"""Largest error allowed, in errors of plain PyTorch."""

THEIR_FACTOR = 4.0
"""The same for other contenders: enough to know that they compute the same thing."""

MAX_MASS_ERROR = 1e-3
"""Largest error of a mean mass: of a key over the queries that see it, or of a head."""

FLOOR = 1e-5
"""Relative error added to plain PyTorch's, which may be exact by luck."""

POISON_BYTES = 8 * 2**30
"""Free memory that is filled with NaN, at most."""


@dataclass(frozen=True)
class Verdict:
    """fault: what is wrong, in a line; None if nothing is.

    quantity, ratio: where the error is largest against plain PyTorch's, and how large.
    mean_mass_error: largest error of a mean mass; None without masses.
    """

    fault: str | None
    quantity: str = ""
    ratio: float = 0.0
    mean_mass_error: float | None = None


@dataclass(frozen=True)
class Part:
    """One row's heads of one group.

    expected: fp64, by quantity. plain_error: largest and root mean square relative error of plain
    PyTorch, by quantity. mask: of this row alone.
    """

    row: int
    group: int
    heads: slice
    mask: IntervalMask
    expected: dict[str, Tensor]
    plain_error: dict[str, tuple[float, float]]

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """This part of a whole quantity, whose axes end its name."""
        taken = {
            "B": slice(self.row, self.row + 1),
            "H": self.heads,
            "G": slice(self.group, self.group + 1),
        }
        return tensor[tuple(taken.get(axis, slice(None)) for axis in _axes(name))]


def truth_of(problem: Problem, inputs: Inputs) -> list[Part]:
    """What the inputs must give, for two parts of the batch."""
    case = problem.case
    ends = {(0, 0), (case.batch - 1, case.num_groups - 1)}
    return [_part(problem, inputs, row, group) for row, group in sorted(ends)]


def compare(
    truth: list[Part], quantities: dict[str, Tensor], required: Iterable[str], factor: float
) -> Verdict:
    """Judge what a contender gave; ``factor`` is the error allowed, in errors of plain PyTorch."""
    missing = [name for name in required if name not in quantities]
    if missing:
        return Verdict(f"{missing[0]} is missing")
    for name, tensor in quantities.items():
        if not bool(torch.isfinite(tensor).all()):
            return Verdict(f"{name} holds NaN or infinity", name, float("inf"))
    worst = Verdict(None)
    for part in truth:
        for name, tensor in quantities.items():
            ours, expected = part.take(name, tensor), part.expected[name]
            if ours.shape != expected.shape:
                return Verdict(f"{name} has shape {tuple(tensor.shape)}", name, float("inf"))
            errors = relative_errors(name, ours, expected)
            for kind, error, plain in zip(
                ("largest", "mean"), errors, part.plain_error[name], strict=True
            ):
                ratio = error / (plain + FLOOR)
                if ratio > worst.ratio:
                    fault = None
                    if ratio > factor:
                        fault = (
                            f"{name}: {kind} relative error {error:.2e} is {ratio:.1f} times "
                            f"plain PyTorch's {plain:.2e}, at most {factor:g} allowed"
                        )
                    worst = Verdict(fault, name, ratio)
    mass_errors = [mean_mass_error(part, quantities) for part in truth]
    if None in mass_errors:
        return worst
    worst = replace(worst, mean_mass_error=max(mass_errors))
    if worst.fault is None and worst.mean_mass_error > MAX_MASS_ERROR:
        fault = f"a mean mass is off by {worst.mean_mass_error:.1e}, at most {MAX_MASS_ERROR:g}"
        worst = replace(worst, fault=f"{fault} allowed")
    return worst


def mean_mass_error(part: Part, quantities: dict[str, Tensor]) -> float | None:
    """Largest error of a key's mean mass, or a head's mean first and document mass; or None."""
    means = []
    for name in ("key_mass_BHS", "first_mass_BHT", "document_mass_BHT"):
        if name in quantities:
            error = part.take(name, quantities[name]).double() - part.expected[name]
            if name == "key_mass_BHS":
                means.append(error / part.mask.queries_per_key_BS()[:, None].clamp(min=1))
            else:
                means.append(error.mean(-1))
    return max((mean.abs().max().item() for mean in means), default=None)


def poison_free_memory(device: torch.device) -> None:
    """Fill memory with NaN and free it, so that what a kernel doesn't write shows as NaN."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    num_bytes = min(POISON_BYTES, torch.cuda.mem_get_info(device)[0] // 2)
    # All bits set is NaN in every floating-point type. PyTorch hands the freed block out again.
    torch.full((num_bytes,), 255, dtype=torch.uint8, device=device)


def _axes(name: str) -> str:
    return name.rsplit("_", 1)[1]


def relative_errors(name: str, ours: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and root mean square over tokens of |ours - expected| / |expected|.

    Features are taken together. Tokens with less than the median count as the median: a relative
    error of what is near zero says nothing.
    """
    error, size = (ours.double() - expected).abs(), expected.abs()
    if _axes(name).endswith("D"):
        error, size = error.norm(dim=-1), size.norm(dim=-1)
    size = size.clamp(min=max(size.median().item(), 1e-3 * size.max().item(), 1e-30))
    relative = error / size
    return relative.max().item(), relative.square().mean().sqrt().item()


def _part(problem: Problem, inputs: Inputs, row: int, group: int) -> Part:
    case, mask = problem.case, problem.mask
    heads_per_group = case.heads // case.num_groups
    heads = slice(group * heads_per_group, (group + 1) * heads_per_group)
    rows = slice(row, row + 1)
    row_mask = replace(
        mask,
        start_BT=mask.start_BT[rows],
        stop_BT=mask.stop_BT[rows],
        document_start_BT=mask.document_start_BT[rows],
    )
    exact, plain = [], []
    for head in range(heads.start, heads.stop):
        one = Inputs(
            q_BTHD=inputs.q_BTHD[rows, :, head : head + 1],
            k_BTGD=inputs.k_BTGD[rows, :, group : group + 1],
            v_BTGD=inputs.v_BTGD[rows, :, group : group + 1],
            grad_out_BTHD=inputs.grad_out_BTHD[rows, :, head : head + 1],
        )
        exact.append(_exactly(one, row_mask, problem.scale))
        plain.append(_plainly(one, row_mask, problem.scale))
    expected = _joined(exact)
    errors = {
        name: relative_errors(name, tensor, expected[name])
        for name, tensor in _joined(plain).items()
    }
    return Part(row, group, heads, row_mask, expected, errors)


def _exactly(one: Inputs, mask: IntervalMask, scale: float) -> dict[str, Tensor]:
    """The reference in fp64, for one row and head."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in one[:3]]
    output = sink_attention(
        *leaves, mask, scale=scale, statistics="full", implementation="reference"
    )
    gradients = torch.autograd.grad(output.out_BTHE, leaves, one.grad_out_BTHD.double())
    named = {"out_BTHD": output.out_BTHE.detach(), "lse_BHT": output.lse_BHT.detach()}
    named |= {k: v for k, v in output.statistics._asdict().items() if v is not None}
    return named | dict(zip(("dq_BTHD", "dk_BTGD", "dv_BTGD"), gradients, strict=True))


def _plainly(one: Inputs, mask: IntervalMask, scale: float) -> dict[str, Tensor]:
    """Plain PyTorch in the inputs' dtype, for one row and head."""
    leaves = [tensor.detach().requires_grad_() for tensor in one[:3]]
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    out, probabilities, scores = written_out(q, k, v, ~mask.dense_BTS()[:, None], scale)
    out_BTHD = out.transpose(1, 2)
    gradients = torch.autograd.grad(out_BTHD, leaves, one.grad_out_BTHD)
    named = {"out_BTHD": out_BTHD.detach()}
    named |= read_off(probabilities, scores, mask.document_start_BT)
    named["lse_BHT"] = torch.logsumexp(scores.detach().float(), -1)
    named["entropy_BHT"] = torch.special.entr(probabilities.detach()).sum(-1)
    return named | dict(zip(("dq_BTHD", "dk_BTGD", "dv_BTGD"), gradients, strict=True))


def _joined(heads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Heads side by side; a key's and value's gradient is the sum over the heads that share it."""
    joined = {}
    for name in heads[0]:
        tensors = [head[name] for head in heads]
        axes = _axes(name)
        if "G" in axes:
            joined[name] = torch.stack(tensors).sum(0)
        else:
            joined[name] = torch.cat(tensors, axes.index("H"))
    return joined
