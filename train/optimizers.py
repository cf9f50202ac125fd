"""Optimizers and their weight-decay groups, picked by ``optimizer=NAME``.

``optimizer.decay`` decides what is decayed: ``all`` parameters (what the code of arXiv 2410.10781
does) or ``matrices`` only (weights with two or more dimensions; norms and biases go free).
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from kernels.errors import require


class Decay(StrEnum):
    all = "all"
    matrices = "matrices"


@dataclass(kw_only=True)
class OptimizerConfig:
    """What every optimizer has."""

    lr: float = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay: each step multiplies a weight by 1 - lr * weight_decay."""
    decay: Decay = Decay.matrices
    """Which parameters decay: all, or matrices only."""
    clip: float | None = 1.0
    """Largest l2 norm of the whole gradient; null = no clipping."""

    def __post_init__(self):
        require(self.lr > 0, "optimizer.lr", "must be > 0", self.lr)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "must be >= 0", self.weight_decay)
        require(
            self.clip is None or self.clip > 0, "optimizer.clip", "must be > 0 or null", self.clip
        )


@dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", "must be in [0, 1)", value)


@dataclass(kw_only=True)
class MuonConfig(AdamWConfig):
    """Muon for the matrices inside the blocks, AdamW for embeddings, unembedding and vectors.

    Updates are scaled to AdamW's root mean square, so one ``lr`` serves both parts.
    """

    momentum: float = 0.95
    """Decay rate of Muon's momentum."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.momentum < 1, "optimizer.momentum", "must be in [0, 1)", self.momentum)


@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum; decay is coupled, as in ``torch.optim.SGD``."""

    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Decay rate of the momentum."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.momentum < 1, "optimizer.momentum", "must be in [0, 1)", self.momentum)


class OptimizerPair(torch.optim.Optimizer):
    """Two optimizers that step as one, for trainers and schedulers that take a single optimizer."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], defaults={})
        self._share_groups()

    def _share_groups(self) -> None:
        # Schedulers write into these dictionaries, and the parts must see it.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def _matrices(model: nn.Module) -> list[Tensor]:
    """Weights of linear layers and embeddings; a learned key or bias of each head is none."""
    weighted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    # Tied ones are one.
    return list({id(m.weight): m.weight for m in weighted}.values())


def _decay_groups(
    parameters: list[Tensor], matrices: list[Tensor], config: OptimizerConfig
) -> list[dict]:
    """One group that decays and one that doesn't, empty ones left out."""
    may_decay = {id(p) for p in matrices}
    decayed = [p for p in parameters if config.decay is Decay.all or id(p) in may_decay]
    chosen = {id(p) for p in decayed}
    free = [p for p in parameters if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        _decay_groups(parameters, _matrices(model), config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def build_muon(model: nn.Module, config: MuonConfig) -> torch.optim.Optimizer:
    """Muon takes the linear layers of ``model.blocks``; everything else goes to AdamW."""
    matrices, inner = _matrices(model), _matrices(model.blocks)
    taken = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(
        _decay_groups(inner, matrices, config),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        _decay_groups(outer, matrices, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    return OptimizerPair(muon, adamw)


def build_sgd(model: nn.Module, config: SGDConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        _decay_groups(list(model.parameters()), _matrices(model), config),
        lr=config.lr,
        momentum=config.momentum,
    )


OPTIMIZERS = {
    "adamw": (AdamWConfig, build_adamw),
    "muon": (MuonConfig, build_muon),
    "sgd": (SGDConfig, build_sgd),
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config``'s class stands for, over ``model``'s parameters."""
    for config_class, build in OPTIMIZERS.values():
        if type(config) is config_class:
            return build(model, config)
    raise AssertionError(f"no optimizer for {type(config).__name__}")
