"""What a user would do for the same statistics without this kernel.

``materialised`` writes the attention matrix out: scores in the working dtype, the softmax in fp32,
and every statistic read off it. It is also the yardstick of the check: plain PyTorch at the same
dtype.

``second_pass`` keeps a fused kernel for the output, takes its lse, and reads the statistics off the
scores a second time:

    first_mass[i] = exp(s[i, 0] - lse[i])      key_mass[k] = sum_i exp(s[i, k] - lse[i])

The masses of named keys are one dot product a query (compiled). For key mass and maximum there are
two ways, of which the faster is timed:

- ``cudnn+chunks`` (causal): the scores of 256 queries at a time, up to their last key, and a
  compiled reduction of them. What most people write.
- ``flex``: FlexAttention gives lse and maximum with the output, and once more, with keys in the
  place of queries and lse subtracted by ``score_mod``, key mass: the exponential of that pass's
  own lse.

Axes: B rows of the batch, T query positions, S key positions, C queries of a chunk, H query heads,
D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from kernels.attention.statistics import mass_at
from kernels.bench.backends import block_mask
from kernels.bench.cases import Case, Inputs, Problem
from kernels.bench.contender import (
    BASIC,
    Bind,
    Call,
    Contender,
    Forward,
    Skipped,
    leaves_in_layout,
    repeat_groups,
    swap_heads_and_tokens,
)

CHUNK = 256
"""Queries whose scores ``cudnn+chunks`` writes out at a time."""

MATRIX_BYTES = 18
"""Bytes a pair that ``materialised`` holds at its peak: scores, masked scores, probabilities in
fp32 and in the working dtype, and the gradients of the last three."""


def written_out(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, hidden_B1TS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: out [B, H, T, D], probabilities (fp32) and scores, both [B, H, T, S].

    hidden_B1TS: True where the key is hidden; each query must see one.
    """
    scores_BHTS = ((q_BHTD * scale) @ k_BHSD.mT).masked_fill(hidden_B1TS, -torch.inf)
    probabilities_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32)
    out_BHTD = probabilities_BHTS.to(v_BHSD.dtype) @ v_BHSD
    return out_BHTD, probabilities_BHTS, scores_BHTS


@torch.no_grad()
def read_off(
    probabilities_BHTS: Tensor, scores_BHTS: Tensor, document_start_BT: Tensor
) -> dict[str, Tensor]:
    """The statistics of level ``basic``, fp32, by name."""
    return {
        "first_mass_BHT": probabilities_BHTS[..., 0].clone(),
        "document_mass_BHT": mass_at(probabilities_BHTS, document_start_BT),
        "key_mass_BHS": probabilities_BHTS.sum(2),
        "max_logit_BH": scores_BHTS.amax((2, 3)).float(),
    }


def _prepare_materialised(problem: Problem, variant: str) -> Bind:
    case = problem.case
    pairs = case.batch * case.heads * case.length**2
    needed = MATRIX_BYTES * pairs
    # A fifth stays free for what the others hold while all are timed in turn.
    if problem.device.type == "cuda" and needed > 0.8 * _free_bytes(problem.device):
        raise Skipped(f"the attention matrices need about {needed / 2**30:.0f} GiB")
    hidden_B1TS = ~problem.mask.dense_BTS()[:, None]

    def bind(inputs: Inputs) -> Call:
        leaves, grad_out = leaves_in_layout(inputs, variant)

        def forward() -> Forward:
            q, k, v = leaves
            k, v = repeat_groups(k, case.heads), repeat_groups(v, case.heads)
            out, *matrices = written_out(q, k, v, hidden_B1TS, problem.scale)
            return Forward(out, read_off(*matrices, problem.mask.document_start_BT))

        return Call(forward, leaves, grad_out, swap_heads_and_tokens)

    return bind


def _free_bytes(device: torch.device) -> int:
    """What the card has free, and what PyTorch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal out [B, H, T, D] and lse [B, H, T], which SDPA drops: from the operator below it."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out, lse.detach().reshape(q.shape[:3])


def named_masses(
    q_BHTD: Tensor, k_BHSD: Tensor, lse_BHT: Tensor, document_start_BT: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """First and document mass by one dot product a query each, in fp32."""
    q_BHTD = q_BHTD.float()

    def mass(key_BHTD: Tensor) -> Tensor:
        return torch.exp(scale * (q_BHTD * key_BHTD.float()).sum(-1) - lse_BHT)

    first_BHT = mass(k_BHSD[:, :, :1])
    if document_start_BT is None:
        return {"first_mass_BHT": first_BHT, "document_mass_BHT": first_BHT}
    index = document_start_BT.long()[:, None, :, None].expand_as(q_BHTD)
    sees_first_BT = document_start_BT == 0
    return {
        "first_mass_BHT": first_BHT * sees_first_BT[:, None],
        "document_mass_BHT": mass(k_BHSD.gather(2, index)),
    }


def chunk_statistics(
    q_BHCD: Tensor, k_BHSD: Tensor, lse_BHC: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Mass of each key [B, H, S] and largest score [B, H] of a chunk's queries, causal."""
    scores_BHCS = (q_BHCD @ k_BHSD.mT).float() * scale
    query_C1 = torch.arange(q_BHCD.shape[2], device=q_BHCD.device)[:, None] + start
    hidden_CS = torch.arange(k_BHSD.shape[2], device=q_BHCD.device) > query_C1
    scores_BHCS = scores_BHCS.masked_fill(hidden_CS, -torch.inf)
    return torch.exp(scores_BHCS - lse_BHC[..., None]).sum(2), scores_BHCS.amax((2, 3))


def key_mass_by_flex(
    q_BHTD: Tensor, k_BHSD: Tensor, lse_BHT: Tensor, key_major_mask: BlockMask, scale: float
) -> Tensor:
    """[B, H, S]: exp of the lse of attention from keys to queries, scores less the query's lse."""

    def less_lse(score, b, h, key, query):
        return score - lse_BHT[b, h, query]

    # FlexAttention always makes an output; 16 features are the fewest it takes.
    _, aux = flex_attention(
        k_BHSD,
        q_BHTD,
        q_BHTD[..., :16],
        score_mod=less_lse,
        block_mask=key_major_mask,
        scale=scale,
        return_aux=AuxRequest(lse=True),
    )
    return torch.exp(aux.lse)


def _second_pass_variants(case: Case) -> tuple[str, ...]:
    return ("cudnn+chunks", "flex") if case.mask == "causal" else ("flex",)


def _prepare_second_pass(problem: Problem, variant: str) -> Bind:
    attend = _cudnn_and_chunks(problem) if variant == "cudnn+chunks" else _flex_twice(problem)
    heads = problem.case.heads
    compiled_masses = torch.compile(named_masses, dynamic=False)
    is_causal = problem.document_BT is None
    document_start_BT = None if is_causal else problem.mask.document_start_BT

    def bind(inputs: Inputs) -> Call:
        leaves, grad_out = leaves_in_layout(inputs, "BHTD")

        def forward() -> Forward:
            out, lse_BHT, measure = attend(*leaves)
            with torch.no_grad():
                q, k = leaves[0].detach(), repeat_groups(leaves[1].detach(), heads)
                measured = compiled_masses(q, k, lse_BHT, document_start_BT, problem.scale)
                measured = {**measured, **measure(q, k)}
            return Forward(out, measured)

        return Call(forward, leaves, grad_out, swap_heads_and_tokens)

    return bind


def _cudnn_and_chunks(problem: Problem):
    scale, length = problem.scale, problem.case.length
    # One compilation for chunks of every length.
    compiled = torch.compile(chunk_statistics, dynamic=True)

    def attend(q: Tensor, k: Tensor, v: Tensor):
        out, lse_BHT = cudnn_with_lse(q, k, v, scale)

        def measure(q: Tensor, k: Tensor) -> dict[str, Tensor]:
            key_mass_BHS = torch.zeros_like(lse_BHT)
            largest = []
            for start in range(0, length, CHUNK):
                stop = min(start + CHUNK, length)
                mass_BHS, max_logit_BH = compiled(
                    q[:, :, start:stop], k[:, :, :stop], lse_BHT[:, :, start:stop], start, scale
                )
                key_mass_BHS[:, :, :stop] += mass_BHS
                largest.append(max_logit_BH)
            return {"key_mass_BHS": key_mass_BHS, "max_logit_BH": torch.stack(largest).amax(0)}

        return out, lse_BHT, measure

    return attend


def _flex_twice(problem: Problem):
    scale = problem.scale
    mask, key_major_mask = block_mask(problem), block_mask(problem, key_major=True)
    grouped = problem.case.num_groups != problem.case.heads

    def with_statistics(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask):
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=grouped,
            return_aux=AuxRequest(lse=True, max_scores=True),
        )
        # Detached here: a compiled function makes gradients for what it could differentiate.
        return out, aux.lse.detach(), aux.max_scores.detach()

    compiled = torch.compile(with_statistics, dynamic=False)
    compiled_key_mass = torch.compile(key_mass_by_flex, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor):
        out, lse_BHT, max_score_BHT = compiled(q, k, v, mask)

        def measure(q: Tensor, k: Tensor) -> dict[str, Tensor]:
            key_mass_BHS = compiled_key_mass(q, k, lse_BHT, key_major_mask, scale)
            return {"key_mass_BHS": key_mass_BHS, "max_logit_BH": max_score_BHT.amax(-1)}

        return out, lse_BHT, measure

    return attend


MATERIALISED = Contender(
    name="materialised",
    variants=lambda case: ("BHTD",),
    prepare=_prepare_materialised,
    # Each captured graph would hold its own attention matrices.
    captures=False,
    gives=BASIC,
)
SECOND_PASS = Contender(
    name="second_pass",
    variants=_second_pass_variants,
    prepare=_prepare_second_pass,
    compiles=True,
    gives=BASIC,
)
