"""How weights are moved: AdamW with two groups, warm-up and cosine, and the moving average beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .settings import Optim


def adamw(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Weight decay falls on matrices that multiply activations: not on norms, biases, tables, tokens or scales."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    settings = [{"params": groups[True], "weight_decay": optim.weight_decay},
                {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name.endswith("weight") and "positions" not in name


def rate(step: int, total: int, optim: Optim) -> float:
    """What `lr` is multiplied by at a step, counted from 0."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    share = (step - optim.warmup) / max(total - optim.warmup, 1)
    return optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """After step 1, 2, ...: average = d * average + (1 - d) * module, d at first step / (9 + step), then `decay`."""
    d = min(decay, step / (9 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - d)
