"""PyTorch's attention kernels: cuDNN and flash behind SDPA, FlexAttention, and flash by documents.

Each gets what it likes best: the faster of two layouts (measured), masks built beforehand,
compiled for the exact shape. FlexAttention runs with the kernel options PyTorch picks itself.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim, N
tokens of all rows.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernels.bench.cases import Case, Inputs, Problem
from kernels.bench.contender import (
    LAYOUTS,
    Bind,
    Call,
    Contender,
    Forward,
    Skipped,
    leaves_in_layout,
    swap_heads_and_tokens,
)


def _causal_only(case: Case) -> tuple[str, ...]:
    """SDPA has no document mask but a dense one, which neither backend takes."""
    return LAYOUTS if case.mask == "causal" else ()


def _sdpa(name: str, backend: SDPBackend) -> Contender:
    def prepare(problem: Problem, variant: str) -> Bind:
        grouped = problem.case.num_groups != problem.case.heads

        def bind(inputs: Inputs) -> Call:
            leaves, grad_out = leaves_in_layout(inputs, variant)

            def forward() -> Forward:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(
                        *leaves, is_causal=True, scale=problem.scale, enable_gqa=grouped
                    )
                return Forward(out, {})

            return Call(forward, leaves, grad_out, swap_heads_and_tokens)

        return bind

    return Contender(name=name, variants=_causal_only, prepare=prepare)


def block_mask(problem: Problem, *, key_major: bool = False) -> BlockMask:
    """The problem's mask for FlexAttention; ``key_major`` has keys in the place of queries."""
    document_BT = problem.document_BT

    def causal(b, h, query, key):
        return query >= key

    def documents(b, h, query, key):
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    sees = causal if document_BT is None else documents

    def seen_by(b, h, key, query):
        return sees(b, h, query, key)

    case = problem.case
    return create_block_mask(
        seen_by if key_major else sees,
        B=None if document_BT is None else case.batch,
        H=None,
        Q_LEN=case.length,
        KV_LEN=case.length,
        device=problem.device,
    )


def _prepare_flex(problem: Problem, variant: str) -> Bind:
    mask = block_mask(problem)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = problem.case.num_groups != problem.case.heads

    def bind(inputs: Inputs) -> Call:
        leaves, grad_out = leaves_in_layout(inputs, variant)

        def forward() -> Forward:
            out = compiled(*leaves, block_mask=mask, scale=problem.scale, enable_gqa=grouped)
            return Forward(out, {})

        return Call(forward, leaves, grad_out, swap_heads_and_tokens)

    return bind


def _prepare_varlen(problem: Problem, variant: str) -> Bind:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Skipped(f"this PyTorch has no varlen_attn: {error}") from error
    case = problem.case
    if case.num_groups != case.heads:
        raise Skipped("varlen_attn takes grouped heads in later PyTorch releases only")
    bounds, longest = _document_bounds(problem)
    # Read once: a value read from the device in each call would wait for it.
    cumulative = torch.tensor(bounds, dtype=torch.int32, device=problem.device)

    def bind(inputs: Inputs) -> Call:
        leaves = tuple(x.detach().flatten(0, 1).requires_grad_() for x in inputs[:3])
        grad_out_NHD = inputs.grad_out_BTHD.flatten(0, 1)

        def forward() -> Forward:
            out_NHD = varlen_attn(
                *leaves,
                cumulative,
                cumulative,
                longest,
                longest,
                scale=problem.scale,
                window_size=(-1, 0),
            )
            return Forward(out_NHD, {})

        return Call(
            forward, leaves, grad_out_NHD, lambda x: x.unflatten(0, (case.batch, case.length))
        )

    return bind


def _document_bounds(problem: Problem) -> tuple[list[int], int]:
    """Where documents begin in the flattened batch, with its end; and the longest, in tokens."""
    case = problem.case
    position_T = torch.arange(case.length, device=problem.device)
    begins_BT = problem.mask.document_start_BT == position_T
    bounds = [*begins_BT.flatten().nonzero().flatten().tolist(), case.batch * case.length]
    return bounds, max(end - start for start, end in itertools.pairwise(bounds))


CUDNN = _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION)
FLASH = _sdpa("flash", SDPBackend.FLASH_ATTENTION)
FLEX = Contender(name="flex", variants=lambda case: LAYOUTS, prepare=_prepare_flex, compiles=True)
FLASH_VARLEN = Contender(
    name="flash_varlen",
    variants=lambda case: ("BTHD",) if case.mask == "documents" else (),
    prepare=_prepare_varlen,
)
