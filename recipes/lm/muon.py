"""Muon (Jordan et al., 2024) for the matrices inside blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mm.nn.grouped import StackedLinear
from mm.nn.linear import FusedLinear

from ..train.optim import parameter_groups
from ..train.plans import SplitLinear, split_order
from ..train.shard import local
from .settings import LmOptim

STEPS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
OUTSIDE = ("embed", "head")  # tables and what scores the vocabulary


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `parts` move by orthogonal steps instead.

    Such a group holds matrices (rows, D), each made of `parts` stacked by rows that are orthogonalised one by one, as
    are the experts of (X, rows, D); `split` is over how many processes those rows were dealt out. A step is
    0.2 sqrt(max(rows, D)) times the learning rate, which gives it the size of AdamW's (Liu et al., 2025).
    torch.optim.Muon takes neither parts nor experts, and works in bfloat16 everywhere.
    """

    def __init__(self, params: Any, momentum: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, p.grad) for group in self.param_groups if group["parts"] for p in group["params"]
                 if p.grad is not None]
        for group in self.param_groups:
            for p in group["params"] if group["parts"] else ():
                if p.grad is not None:
                    self.turn(p, group)
                    p.grad = None  # which AdamW passes over
        super().step()
        for p, grad in moved:
            p.grad = grad
        return loss

    def turn(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:  # AdamW wants a step of everything that has a state
            state |= {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}
        state["step"] += 1
        state["momentum"].lerp_(p.grad, 1 - self.momentum)
        ahead = p.grad.lerp(state["momentum"], self.momentum)  # Nesterov
        p.mul_(1 - group["lr"] * group["weight_decay"])
        update = step_of(whole(ahead), group["parts"], group["split"])
        local(p).add_(share(update.to(p.dtype), p), alpha=-group["lr"])


def step_of(matrix: Tensor, parts: list[int], split: int) -> Tensor:
    """Every part of (..., rows, D) made orthogonal and scaled; the rows as they were dealt out."""
    if split > 1 and len(parts) > 1:
        order = split_order(parts, split).to(matrix.device)
        return step_of(matrix[..., order.argsort(), :], parts, 1)[..., order, :]
    return torch.cat([orthogonal(part) * 0.2 * max(part.shape[-2:]) ** 0.5 for part in matrix.split(parts, -2)], -2)


def orthogonal(matrix: Tensor) -> Tensor:
    """(..., rows, D) -> nearly the nearest matrix with orthonormal rows or columns, by Newton-Schulz steps; in bfloat16
    on a GPU, float32 on a CPU, where that is several times faster."""
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is spread as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def muon(model: nn.Module, optim: LmOptim) -> Muon:
    """The optimizer of a model's weights: matrices inside its blocks move by Muon."""
    parts = matrices(model)
    groups = parameter_groups(model, optim, lambda name: parts.get(name, ((), 1)))
    named = [group | {"parts": list(sizes), "split": world} for (sizes, world), group in groups]
    return Muon(named, optim.momentum, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def matrices(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """The names of the weights inside blocks: how many rows each of their parts has, and over how many processes those
    are dealt out."""
    return {f"{name}.weight": rows(module) for name, module in model.named_modules()
            if name.split(".")[0] not in OUTSIDE and isinstance(module, nn.Linear | FusedLinear | StackedLinear)}


def rows(module: nn.Module) -> tuple[tuple[int, ...], int]:
    if isinstance(module, SplitLinear):
        return tuple(size * module.world for size in module.sizes), module.world
    return (module.sizes if isinstance(module, FusedLinear) else (module.weight.shape[-2],)), 1
