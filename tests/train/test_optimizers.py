"""Optimizers: who decays, and two that step as one."""

import pytest
import torch
from torch import nn

from train.optimizers import (
    OPTIMIZERS,
    AdamWConfig,
    Decay,
    MuonConfig,
    OptimizerPair,
    build_optimizer,
)


class Model(nn.Module):
    """The parts that the optimizers tell apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4, bias=False)
        # As a key bias of each head is: two axes, but no matrix.
        self.blocks[0].register_parameter("key_GD", nn.Parameter(torch.ones(2, 3)))

    def forward(self, x):
        y = self.norm(self.blocks[0](self.embedding(x))).square().sum()
        return y + self.blocks[0].key_GD.square().sum()


def decayed_shapes(optimizer):
    groups = optimizer.param_groups
    return sorted(tuple(p.shape) for g in groups if g["weight_decay"] > 0 for p in g["params"])


def test_decay_reaches_all_parameters_or_matrices_only():
    everything = build_optimizer(Model(), AdamWConfig(decay=Decay.all))
    assert decayed_shapes(everything) == [(2, 3), (4,), (4,), (4, 4), (8, 4)]
    matrices = build_optimizer(Model(), AdamWConfig(decay=Decay.matrices))
    assert decayed_shapes(matrices) == [(4, 4), (8, 4)]


def test_muon_takes_the_matrices_of_the_blocks_only():
    optimizer = build_optimizer(Model(), MuonConfig())
    assert isinstance(optimizer, OptimizerPair)
    muon, adamw = optimizer.parts
    assert [tuple(p.shape) for g in muon.param_groups for p in g["params"]] == [(4, 4)]
    shapes = sorted(tuple(p.shape) for g in adamw.param_groups for p in g["params"])
    assert shapes == [(2, 3), (4,), (4,), (8, 4)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_follows_the_schedule_and_continues_from_its_state(name):
    config_class, _ = OPTIMIZERS[name]

    def make():
        model = Model()
        optimizer = build_optimizer(model, config_class(lr=0.01))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return model, optimizer, schedule

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.arange(8)).backward()
            optimizer.step()
            schedule.step()

    straight = make()
    train(*straight, 4)
    first = make()
    train(*first, 2)
    second = make()
    for part, other in zip(second, first, strict=True):
        part.load_state_dict(other.state_dict())
    train(*second, 2)
    assert {group["lr"] for group in second[1].param_groups} == {0.01 / 5}
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(straight[0].embedding.weight, Model().embedding.weight)


def test_the_pair_steps_both_parts_at_the_scheduled_rate():
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, MuonConfig(lr=0.01))
    model(torch.arange(8)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
