"""FSDP2: weights, gradients and optimizer state of the towers spread over processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ...encoders.clip import CLIP


def shard(clip: CLIP, mesh: DeviceMesh) -> None:
    """Spread every block, and what is left of every tower; scale and offset stay whole."""
    for tower in (clip.image, clip.text, clip.audio):
        if tower is not None:
            for block in tower.stack.blocks if hasattr(tower, "stack") else ():
                fully_shard(block, mesh=mesh)
            fully_shard(tower, mesh=mesh)
            register_fsdp_forward_method(tower, "encode")


def shell(module: nn.Module) -> nn.Module:
    """A copy without memory for its weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def whole(module: nn.Module, hollow: nn.Module) -> nn.Module:
    """A spread module in one piece, in a copy of its shell; all processes have to call it."""
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value
             for name, value in module.state_dict().items()}
    made = copy.deepcopy(hollow)
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).train(module.training)


def separate(optimizer: torch.optim.Optimizer) -> None:
    """Give whole parameters groups of their own: no kernel takes both kinds."""
    for group in list(optimizer.param_groups):
        alone = [p for p in group["params"] if not isinstance(p, DTensor)]
        group["params"] = [p for p in group["params"] if isinstance(p, DTensor)]
        if alone:
            optimizer.add_param_group({**group, "params": alone})


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The norm of all gradients, wherever they lie, which are then shortened to `largest`."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    spread = [local(grad) for grad in grads if isinstance(grad, DTensor)]
    if not spread:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    total = torch.stack([part.float().square().sum() for part in spread]).sum()
    torch.distributed.all_reduce(total)
    total = total + sum(grad.float().square().sum() for grad in grads if not isinstance(grad, DTensor))
    norm = total.sqrt()
    if largest < math.inf:
        for grad in grads:
            local(grad).mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
