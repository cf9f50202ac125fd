"""How a run's ranks share the work: DDP, or FSDP2 with every parameter cut up.

Both see the same rows in the same global batches as one rank does.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from train.config import StrategyName, TrainerConfig
from train.ranks import PATIENCE
from train.sharding import ShardedStrategy


def trainer_arguments(
    trainer: TrainerConfig, world_size: int, plugins: list[Any]
) -> dict[str, Any]:
    """What Lightning's Trainer must know about the ranks that ``train.ranks.join`` met.

    plugins: those that it is to have anyway.
    """
    if world_size == 1:
        return {"devices": 1, "plugins": plugins}
    strategy: Strategy
    if trainer.strategy is StrategyName.fsdp:
        strategy = ShardedStrategy(world_size)
    else:
        strategy = DDPStrategy(gradient_as_bucket_view=True, timeout=PATIENCE)
    return {
        "devices": world_size // trainer.num_nodes,
        "num_nodes": trainer.num_nodes,
        "strategy": strategy,
        # Reads the variables that ``train.ranks`` has seen to, whoever started the ranks.
        "plugins": [*plugins, TorchElasticEnvironment()],
    }


def ask_no_other_rank(trainer: L.Trainer) -> None:
    """Keep Lightning from asking rank 0 before every micro-batch whether it got SIGTERM.

    The answer is read on the host, which would wait for the device each time.
    """
    loop = trainer.fit_loop.epoch_loop
    assert hasattr(loop, "_broadcast_sigterm_tensor"), "Lightning asks in another way now"
    loop._broadcast_sigterm_tensor = lambda: None
