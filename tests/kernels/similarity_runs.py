"""Similarity attention run on a case: by a direct formula, and by ``similarity_attention``.

Axes: B rows of the batch, T query positions, S key positions, H query heads, G key/value heads,
D query/key head dim, E value head dim.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from kernels.similarity import similarity_attention
from kernels.similarity.similarities import ALLOWED
from tests.kernels.cases import Case
from tests.kernels.runs import on_device, prepared

KINDS = [(similarity, normalize) for similarity in ALLOWED for normalize in ALLOWED[similarity]]


def tensors(case: Case, kind: tuple[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The case's tensors; positive queries and keys where identity is divided by its sum."""
    leaves = {name: x.detach() for name, x in case.tensors(dtype).items()}
    if kind == ("identity", "sum"):
        leaves["q_BTHD"], leaves["k_BTGD"] = leaves["q_BTHD"].abs(), leaves["k_BTGD"].abs()
    return {name: x.requires_grad_() for name, x in leaves.items()}


def weigh(x: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """f(x), and what its normalizer sums; no care is taken of large scores."""
    if similarity == "softpick":
        return torch.relu(torch.exp(x) - 1), torch.abs(torch.exp(x) - 1)
    f = {
        "identity": lambda: x,
        "sigmoid": lambda: 1 / (1 + torch.exp(-x)),
        "elu": lambda: torch.nn.functional.elu(x) + 1,
    }[similarity]()
    return f, f


def divisor(sum_of_g: Tensor, similarity: str, normalize: str) -> Tensor:
    if similarity == "softpick":
        return sum_of_g + 1e-6
    if normalize == "clamped_sum":
        return sum_of_g.abs().clamp(min=1)
    return sum_of_g if normalize == "sum" else torch.ones_like(sum_of_g)


def by_definition(case: Case, kind: tuple[str, str], leaves: dict[str, Tensor]) -> SimpleNamespace:
    """Output, row sums and every statistic, each query on its own; differentiable."""
    similarity, normalize = kind
    q, k, v = (leaves[name] for name in ("q_BTHD", "k_BTGD", "v_BTGE"))
    B, T, H, D = q.shape
    visible_BTS = case.mask.dense_BTS()
    row_abs_sum, first, document, entropy, key_mass = (
        torch.zeros(B, H, T, dtype=q.dtype) for _ in range(5)
    )
    max_logit = torch.full((B, H), -torch.inf, dtype=q.dtype)
    out = []
    for b in range(B):
        for i in range(T):
            keys = visible_BTS[b, i].nonzero()[:, 0]
            document_start = int(case.mask.document_start_BT[b, i])
            for h in range(H):
                g = h // (H // case.G)
                if not len(keys):
                    out.append(0 * v[b, i, g])
                    continue
                x = k[b, keys, g] @ q[b, i, h] * D**-0.5 + case.bias
                if case.slopes:
                    x = x - leaves["slopes_H"][h] * (i - keys)
                f, summed = weigh(x, similarity)
                weights = f / divisor(summed.sum(), similarity, normalize)
                out.append(weights @ v[b, keys, g])
                total = f.detach().abs().sum()
                row_abs_sum[b, h, i] = weights.detach().sum() if similarity == "softpick" else total
                max_logit[b, h] = max(max_logit[b, h], x.detach().max())
                if total == 0:
                    continue
                p = torch.zeros(T, dtype=q.dtype)
                p[keys] = f.detach().abs() / total
                key_mass[b, h] += p
                first[b, h, i] = p[0]
                document[b, h, i] = p[document_start] if document_start >= 0 else 0
                entropy[b, h, i] = torch.special.entr(p).sum()
    return SimpleNamespace(
        out=torch.stack(out).view(B, T, H, case.E),
        row_abs_sum=row_abs_sum,
        first_mass_BHT=first,
        document_mass_BHT=document,
        null_mass_BHT=None,
        key_mass_BHS=key_mass,
        max_logit_BH=max_logit,
        entropy_BHT=entropy,
    )


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a weighted sum of out."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    # Exact in every dtype, as the inputs are.
    loss = (out * (weight * 16).round().div(16).to(out)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def run(
    case: Case,
    kind: tuple[str, str],
    dtype: torch.dtype,
    tap: bool = False,
    device: str = "cpu",
    **settings,
):
    """All that a call gives, with the row sums as ``lse_BHT``, and gradients by argument name."""
    leaves, arguments = prepared(case, tensors(case, kind, dtype), tap, device, settings)
    output = similarity_attention(
        **arguments,
        mask=case.mask.to(device),
        similarity=kind[0],
        normalize=kind[1],
        bias=case.bias,
        **settings,
    )
    found = gradients(output.out_BTHE, list(leaves.values()))
    given = SimpleNamespace(
        out_BTHE=output.out_BTHE,
        lse_BHT=output.row_abs_sum_BHT,
        statistics=output.statistics,
        probabilities_BHTS=output.probabilities_BHTS,
    )
    return given, dict(zip(leaves, found, strict=True))


def plain(case: Case, kind: tuple[str, str], dtype: torch.dtype, device: str = "cpu"):
    """out, and gradients through it, as one would write them, all of it in ``dtype``."""
    leaves = on_device(tensors(case, kind, dtype), device)
    q_BHTD, k_BHSD, v_BHSE = (leaves[name].transpose(1, 2) for name in list(leaves)[:3])
    k_BHSD, v_BHSE = (x.repeat_interleave(case.H // case.G, dim=1) for x in (k_BHSD, v_BHSE))
    visible_B1TS = case.mask.dense_BTS()[:, None].to(device)
    f_BHTS, summed_BHTS = weigh((q_BHTD @ k_BHSD.mT) * case.D**-0.5 + case.bias, kind[0])
    f_BHTS, summed_BHTS = f_BHTS * visible_B1TS, summed_BHTS * visible_B1TS
    sum_BHT1 = summed_BHTS.sum(-1, keepdim=True)
    if kind[1] == "sum":
        sum_BHT1 = sum_BHT1 + ~visible_B1TS.any(-1, keepdim=True)
    out_BTHE = (f_BHTS / divisor(sum_BHT1, *kind) @ v_BHSE).transpose(1, 2)
    found = gradients(out_BTHE, list(leaves.values()))
    return {"out": out_BTHE.detach(), **dict(zip(leaves, found, strict=True))}
