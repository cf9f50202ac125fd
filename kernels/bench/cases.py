"""What is timed: shapes and masks, the inputs, and the arithmetic that a case asks for.

A case fixes shape, mask and dtype; a problem is a case with its mask on a device. The arithmetic
counts the pairs a mask shows and nothing else, four FLOPs a pair and feature in the forward pass
(two matrix products) and ten in the backward pass (five), so a kernel that computes hidden pairs
gets no credit for them.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.errors import UserError, require
from kernels.masks import IntervalMask

MASKS = ("causal", "documents")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_LENGTH = 16384
"""Tokens a row; the check writes one head's attention matrix out in fp64 (2 GiB at this length)."""

DOCUMENT_MEDIAN, DOCUMENT_SIGMA = 400, 1.2
"""Tokens, and standard deviation of their logarithm: about what web text has (mean 820 tokens, one
document in eight over 1,600), so most of a long row is hidden and tiles are cut at odd places."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape under one mask.

    alternatives: also time what a user would do for the statistics without this kernel.
    """

    batch: int
    heads: int
    length: int
    head_dim: int
    mask: str = "causal"
    groups: int = 0
    """Key/value heads; 0 = as many as query heads."""
    dtype: str = "bf16"
    alternatives: bool = True

    def __post_init__(self):
        for name in ("batch", "heads"):
            require(
                getattr(self, name) >= 1, f"--shape {name}", "must be >= 1", getattr(self, name)
            )
        limit = f"must be 16 to {MAX_LENGTH}"
        require(16 <= self.length <= MAX_LENGTH, "--shape length", limit, self.length)
        require(
            16 <= self.head_dim <= 256 and self.head_dim % 8 == 0,
            "--shape head dim",
            "must be a multiple of 8 from 16 to 256",
            self.head_dim,
        )
        rule = f"must be >= 1 and divide the {self.heads} heads"
        divides = self.groups >= 0 and self.heads % self.num_groups == 0
        require(divides, "--groups", rule, self.groups)

    @property
    def num_groups(self) -> int:
        """Key/value heads."""
        return self.groups or self.heads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, T, D: the order in which attention shapes are commonly written."""
        return (self.batch, self.heads, self.length, self.head_dim)

    @property
    def label(self) -> str:
        """``32,12,2048,64 causal``, with the groups where they are fewer than the heads."""
        groups = "" if self.num_groups == self.heads else f" G{self.num_groups}"
        return f"{','.join(map(str, self.shape))}{groups} {self.mask}"


class Inputs(NamedTuple):
    """What attention is given: fresh tensors, contiguous, in the case's dtype."""

    q_BTHD: Tensor
    k_BTGD: Tensor
    v_BTGD: Tensor
    grad_out_BTHD: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case with its mask on a device.

    document_BT: int32 ids from 1; None under a causal mask, where a row is one document.
    pairs: (query, key) pairs the mask shows, over all rows of the batch, for one head.
    """

    case: Case
    device: torch.device
    mask: IntervalMask
    document_BT: Tensor | None
    pairs: int

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return self.case.head_dim**-0.5

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward pass."""
        return 4 * self.pairs * self.case.heads * self.case.head_dim

    @property
    def total_flops(self) -> int:
        """Of forward and backward: the backward pass makes 2.5 times the forward's products."""
        return self.forward_flops * 7 // 2

    @property
    def input_bytes(self) -> int:
        """Size of one set of q, k and v."""
        case = self.case
        numbers = case.batch * case.length * case.head_dim * (case.heads + 2 * case.num_groups)
        return 2 * numbers

    def inputs(self, index: int) -> Inputs:
        """Set number ``index``: seeded, so each run and contender sees the same numbers.

        Scores have a deviation of 2, so that attention is far from flat, and queries share a
        direction that the first key of every document has: its score is 8 higher, a sink as trained
        models have. Masses that are all near zero would check nothing.
        """
        case = self.case
        generator = torch.Generator(self.device).manual_seed(index)

        def normal(heads: int) -> Tensor:
            shape = (case.batch, case.length, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=self.device)

        q_BTHD, k_BTGD, v_BTGD = (
            normal(case.heads),
            normal(case.num_groups),
            normal(case.num_groups),
        )
        grad_out_BTHD = normal(case.heads)
        # Signs, so that no feature is larger than the others and hides their errors.
        direction_D = torch.sign(
            torch.randn(case.head_dim, generator=generator, device=self.device)
        )
        q_BTHD = 2 * q_BTHD + direction_D
        position_T = torch.arange(case.length, device=self.device)
        begins_BT11 = (self.mask.document_start_BT == position_T)[..., None, None]
        k_BTGD = torch.where(begins_BT11, 8 * self.scale * direction_D, k_BTGD)
        tensors = (q_BTHD, k_BTGD, v_BTGD, grad_out_BTHD)
        return Inputs(*(tensor.to(DTYPES[case.dtype]) for tensor in tensors))


def make_problem(case: Case, device: torch.device) -> Problem:
    """Build the mask and count its pairs."""
    document_BT = None
    if case.mask == "documents":
        document_BT = document_ids_BT(case.batch, case.length)
        mask = IntervalMask.from_documents(document_BT)
        document_BT = document_BT.to(device)
    else:
        mask = IntervalMask.causal(case.batch, case.length)
    pairs = int(mask.keys_per_query_BT().sum())
    return Problem(
        case=case, device=device, mask=mask.to(device), document_BT=document_BT, pairs=pairs
    )


def document_ids_BT(batch_size: int, length: int, seed: int = 0) -> Tensor:
    """int32 [B, T] on the CPU: documents of log-normal length, one after the other, cut into rows.

    As training packs text: every row is full, and a document that is cut goes on in the next row
    as a document of its own.
    """
    drawn = random.Random(seed)
    ids: list[int] = []
    for document in itertools.count(1):
        tokens = max(1, round(drawn.lognormvariate(math.log(DOCUMENT_MEDIAN), DOCUMENT_SIGMA)))
        ids += [document] * tokens
        if len(ids) >= batch_size * length:
            break
    kept = torch.tensor(ids[: batch_size * length], dtype=torch.int32)
    return kept.view(batch_size, length)


def parse_shape(text: str) -> Case:
    """``B,H,T,D`` as a causal case."""
    rule = "must be B,H,T,D, four whole numbers"
    try:
        batch, heads, length, head_dim = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--shape {rule}, got {text!r}") from None
    return Case(batch=batch, heads=heads, length=length, head_dim=head_dim)


def _tokens(batch: int, length: int, head_dim: int, mask: str, alternatives: bool) -> Case:
    return Case(
        batch=batch,
        heads=12,
        length=length,
        head_dim=head_dim,
        mask=mask,
        alternatives=alternatives,
    )


def _record() -> list[Case]:
    """The shapes that claims are made about, then every length; what matters most comes first."""
    main = [(32, 2048, 64), (8, 8192, 64), (16, 2048, 128), (16, 2048, 96)]
    cases = [_tokens(*shape, mask, True) for mask in MASKS for shape in main]
    # 16k tokens first: a claim about memory is made there.
    lengths = (16384, 512, 1024, 4096, 2048, 8192)
    for head_dim, num_tokens in ((64, 65536), (128, 32768), (96, 32768)):
        for length, mask in itertools.product(lengths, MASKS):
            shape = (num_tokens // length, length, head_dim)
            # The alternatives cost minutes to compile; the sweep compares kernels alone.
            if shape not in main:
                cases.append(_tokens(*shape, mask, False))
    return cases


def _quick() -> list[Case]:
    shapes = [(32, 2048, 64, "causal"), (16, 2048, 128, "causal"), (32, 2048, 64, "documents")]
    return [_tokens(*shape, True) for shape in shapes]


PRESETS = {"record": _record, "quick": _quick}


def select_cases(
    preset: str, shapes: list[str], mask: str | None, groups: int, dtype: str
) -> list[Case]:
    """The cases asked for, in the order in which they are timed.

    shapes: ``B,H,T,D`` each, in place of the preset. mask: one of ``MASKS``; None is both.
    groups: key/value heads, 0 for as many as heads. Raises ``UserError`` for what can't be timed.
    """
    if shapes:
        parsed = [parse_shape(text) for text in shapes]
        cases = [replace(case, mask=name) for case in parsed for name in MASKS]
    else:
        cases = PRESETS[preset]()
    return [
        replace(case, groups=groups, dtype=dtype) for case in cases if mask in (None, case.mask)
    ]
