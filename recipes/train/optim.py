"""How weights are moved: AdamW, warm-up and schedule, less for lower layers, and the moving average beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import Optim
from .shard import local


def adamw(module: nn.Module, optim: Optim, share: Callable[[str], float] = lambda name: 1.0) -> torch.optim.AdamW:
    """`share(name)` multiplies a parameter's learning rate; the groups with the largest come first."""
    settings = [group | {"lr": optim.lr * part} for part, group in parameter_groups(module, optim, share)]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def parameter_groups(module: nn.Module, optim: Optim, key: Callable[[str], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """What trains, by `key(name)` and by weight decay, the largest keys first. Weight decay falls on matrices
    and on the embeddings of tokens and codes: not on norms, biases, positions or scales."""
    groups: dict[tuple[Any, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((key(name), decays(name, parameter)), []).append(parameter)
    return [(part, {"params": groups[part, heavy], "weight_decay": optim.weight_decay if heavy else 0.0})
            for part, heavy in sorted(groups, reverse=True)]


def decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and name.endswith("weight") and "positions" not in name


def layer_share(name: str, depth: int, decay: float) -> float:
    """Layer-wise decay of a ViT's learning rates, as timm's: 1 for the head, `decay` for the last of `depth` blocks
    and the final norm, decay ** (depth + 1) for what comes before the first block."""
    parts = name.split(".")
    if parts[0] == "head":
        return 1.0
    block = -1 if parts[0] != "stack" else int(parts[2]) if parts[1] == "blocks" else depth - 1
    return decay ** (depth - block)


def rate(step: int, total: int, optim: Optim) -> float:
    """What `lr` is multiplied by at a step, counted from 0."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    start = optim.warmup if optim.schedule == "cosine" else max(optim.warmup, round(total * (1 - optim.decay)))
    share = min(max(step - start, 0) / max(total - start, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * share)) if optim.schedule == "cosine" else 1 - share
    return optim.final + (1 - optim.final) * left


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """After step 1, 2, ...: average = d * average + (1 - d) * module, d at first step / (9 + step), then `decay`. What
    the two share is left alone."""
    d = min(decay, step / (9 + step))
    pairs = [(a, b) for a, b in zip(average.parameters(), module.parameters(), strict=True) if a is not b]
    torch._foreach_lerp_([local(a) for a, _ in pairs], [local(b) for _, b in pairs], 1 - d)
    for a, b in zip(average.buffers(), module.buffers(), strict=True):  # such as those of batch norms
        a.copy_(b)
