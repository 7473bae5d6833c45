"""FSDP2: weights, gradients and optimizer state of models spread over processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .plans import orders

ENTRANCES = ("encode", "hidden", "condition")  # methods that a recipe calls in place of `forward`


def shard(towers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread every block, and what is left of every tower."""
    for tower in towers:
        for block in tower.stack.blocks if hasattr(tower, "stack") else ():
            fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)
        for name in ENTRANCES:
            if hasattr(tower, name):
                register_fsdp_forward_method(tower, name)


def strategy(spread: bool, devices: int, idle: bool = False, tensor: int = 1) -> str | ModelParallelStrategy:
    """FSDP2 where the weights are spread or `tensor` processes split each layer, else DDP; `idle` says that a step may
    leave weights without gradient."""
    if (spread or tensor > 1) and devices > 1:
        return ModelParallelStrategy(devices // tensor, tensor, save_distributed_checkpoint=False)
    return "ddp_find_unused_parameters_true" if idle else "ddp"


def shell(module: nn.Module) -> nn.Module:
    """A copy without memory for its weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def whole(module: nn.Module, hollow: nn.Module) -> nn.Module:
    """A spread module in one piece, in a copy of its shell; all processes have to call it."""
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value
             for name, value in module.state_dict().items()}
    state |= {name: state[name][order.argsort()] for name, order in orders(module).items()}
    made = copy.deepcopy(hollow)
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).train(module.training)


def separate(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that are whole, and those that are spread in one way, groups of their own: no kernel takes
    several kinds."""
    for group in list(optimizer.param_groups):
        kinds: dict[Any, list[nn.Parameter]] = {}
        for p in group["params"]:
            kinds.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        group["params"], *others = sorted(kinds.values(), key=lambda kind: not isinstance(kind[0], DTensor))
        for kind in others:
            optimizer.add_param_group({**group, "params": kind})


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The norm of all gradients, wherever they lie, which are then shortened to `largest`."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    spread = [grad for grad in grads if isinstance(grad, DTensor)]
    if not spread:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    total = torch.stack([local(grad).float().square().sum() * pieces(grad) for grad in spread]).sum()
    torch.distributed.all_reduce(total)
    total = total / torch.distributed.get_world_size()
    total = total + sum(grad.float().square().sum() for grad in grads if not isinstance(grad, DTensor))
    norm = total.sqrt()
    if largest < math.inf:
        for grad in grads:
            local(grad).mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def pieces(tensor: DTensor) -> int:
    """In how many pieces it lies; further processes hold copies."""
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())


def mean_over_processes(x: Tensor) -> Tensor:
    """() -> (), without gradient."""
    x = x.detach().clone()
    torch.distributed.all_reduce(x)
    return x / torch.distributed.get_world_size()
