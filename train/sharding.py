"""A decoder cut up over ranks (FSDP2), and its checkpoints, which are those of one rank.

What is written are full tensors under the names and in the layout of one rank, so that any number
of ranks may go on from them, with any strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from models.decoder import Decoder
from train.ranks import PATIENCE


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Cut every parameter up over the ranks of ``mesh``; each block is gathered when it runs.

    A second call does nothing.
    """
    if isinstance(decoder, FSDPModule):
        return
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "alone")
    fully_shard(decoder, mesh=mesh)
    # Before FSDP's own hooks: what it calls a forward pass is theirs.
    decoder.register_forward_pre_hook(_hide_taps, prepend=True, with_kwargs=True)
    register_fsdp_forward_method(decoder, "loss")
    loss = decoder.loss

    def loss_with_taps_hidden(*args, **kwargs):
        args, kwargs = _hide_taps(decoder, args, kwargs)
        return loss(*args, **kwargs)

    decoder.loss = loss_with_taps_hidden


class _Hidden(list):
    """A list whose tensors FSDP doesn't look for, because it isn't exactly a list."""


def _hide_taps(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # FSDP takes inputs that get a gradient to get it last, and reduces then. The taps' gradients
    # are there before the embedding's, which would be lost.
    taps = kwargs.get("key_mass_taps")
    return args, kwargs if taps is None else {**kwargs, "key_mass_taps": _Hidden(taps)}


def whole(value: Any) -> Any:
    """A tensor that is cut up put together, on every rank; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(decoder: Decoder) -> dict[str, Tensor]:
    """The weights, put together; all ranks must ask for them."""
    return {name: whole(value) for name, value in decoder.state_dict().items()}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with the checkpoints of one rank.

    Lightning's own strategy names the optimizer's state anew and knows no pair of optimizers.
    """

    def __init__(self, world_size: int):
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=PATIENCE,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._kept(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self._kept(optimizer.state_dict())

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state put together, where it is written; one tensor at a time elsewhere."""

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = whole(value)
            return value.cpu() if self.is_global_zero else None

        return tree_map(kept, state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        like = module.state_dict()
        state = {
            name: _cut(value, like.get(name)) for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(_cut_state(optimizer, state))


def _cut(value: Any, like: Any) -> Any:
    """This rank's part of a full tensor, cut as ``like`` is; what has another shape stays whole."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    value = value.to(like.device)
    # Every rank has read the file, so none needs to send.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _cut_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    if "parts" in state:
        pairs = zip(optimizer.parts, state["parts"], strict=True)
        return {"parts": [_cut_state(part, saved) for part, saved in pairs]}
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    like = dict(zip(saved, ours, strict=True))
    cut = {
        index: {name: _cut(value, like[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": cut}
