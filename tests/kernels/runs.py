"""Attention run on a case: by definition, by ``sink_attention``, and as one would write it.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim, R buckets of relative distance.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.attention import sink_attention
from kernels.masks import DenseMask, IntervalMask
from tests.kernels.cases import Case


def _visible_keys(mask: IntervalMask | DenseMask, b: int) -> list[list[int]]:
    """The keys that each query of row b sees."""
    if isinstance(mask, DenseMask):
        return [[j for j, sees in enumerate(row) if sees] for row in mask.visible_BTS[b].tolist()]
    keys, pinned = range(mask.num_tokens), mask.pinned
    intervals = zip(mask.start_BT[b].tolist(), mask.stop_BT[b].tolist(), strict=True)
    return [
        [j for j in keys if j < stop and (j < pinned or j >= start)] for start, stop in intervals
    ]


def _bucket(distance: int, num_buckets: int) -> int:
    distance = max(distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(128 / exact)
    return min(num_buckets - 1, exact + int(share * (num_buckets - exact)))


def by_definition(case: Case, tensors: dict[str, Tensor]) -> SimpleNamespace:
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
        for i, keys in enumerate(_visible_keys(mask, b)):
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


def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], through: str) -> list[Tensor]:
    """Gradients of a weighted sum of out, of lse (non-empty rows), or of both."""
    generator = torch.Generator().manual_seed(1)

    def weighted_sum(x: Tensor) -> Tensor:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        # Exact in every dtype, as the inputs are.
        return (x * (weight * 16).round().div(16).to(x)).sum()

    of_out, of_lse = weighted_sum(out), weighted_sum(lse.masked_fill(lse == -math.inf, 0))
    loss = {"out": of_out, "lse": of_lse, "both": of_out + of_lse}[through]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def on_device(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Fresh leaves of the same values."""
    return {name: x.detach().to(device).requires_grad_() for name, x in tensors.items()}


def prepared(
    case: Case, tensors: dict[str, Tensor], tap: bool, device: str, settings: dict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves to differentiate by, and arguments of a call: the same but for Triton's slopes."""
    leaves = on_device(tensors, device)
    arguments = dict(leaves)
    if settings.get("implementation") == "triton" and case.slopes:
        leaves.pop("slopes_H")
        arguments["slopes_H"] = arguments["slopes_H"].detach()
    if tap:
        B, T = case.mask.document_start_BT.shape
        tap_dtype = torch.promote_types(tensors["q_BTHD"].dtype, torch.float32)
        tap_BHS = torch.zeros(B, case.H, T, dtype=tap_dtype, device=device, requires_grad=True)
        leaves["key_mass_tap_BHS"] = arguments["key_mass_tap_BHS"] = tap_BHS
    return leaves, arguments


def run(
    case: Case,
    dtype: torch.dtype,
    through: str = "both",
    tap: bool = False,
    device: str = "cpu",
    **settings,
):
    """``sink_attention`` on a case: everything it gives, gradients by argument name included."""
    leaves, arguments = prepared(case, case.tensors(dtype), tap, device, settings)
    positional = [arguments.pop(name) for name in ("q_BTHD", "k_BTGD", "v_BTGE")]
    output = sink_attention(*positional, case.mask.to(device), **arguments, **settings)
    found = gradients(output.out_BTHE, output.lse_BHT, list(leaves.values()), through)
    return output, dict(zip(leaves, found, strict=True))


def plain(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """out, and gradients through it, of attention as one would write it, all of it in ``dtype``."""
    leaves = on_device(case.tensors(dtype), device)
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
    found = gradients(out_BTHE, q_BHTD.new_zeros(1), list(leaves.values()), "out")
    return {"out": out_BTHE.detach(), **dict(zip(leaves, found, strict=True))}
