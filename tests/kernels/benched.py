"""What the benchmark's tests share: a case that takes CPU milliseconds."""

import torch

from kernels.bench.cases import Case

CPU = torch.device("cpu")
OURS = ["sinklab", "sinklab+stats", "sinklab+full"]


def small(mask="causal", groups=0, **changes) -> Case:
    settings = {"batch": 2, "heads": 4, "length": 128, "head_dim": 16, **changes}
    return Case(mask=mask, groups=groups, **settings)
