"""How weights are moved: AdamW, warm-up and cosine, less for lower layers, and the moving average beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .settings import Optim
from .shard import local


def adamw(module: nn.Module, optim: Optim, share: Callable[[str], float] = lambda name: 1.0) -> torch.optim.AdamW:
    """Weight decay falls on matrices that multiply activations: not on norms, biases, tables, tokens or scales.
    `share(name)` multiplies a parameter's learning rate; the groups with the largest come first."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((share(name), decays(name, parameter)), []).append(parameter)
    settings = [{"params": groups[part, heavy], "lr": optim.lr * part,
                 "weight_decay": optim.weight_decay if heavy else 0.0} for part, heavy in sorted(groups, reverse=True)]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


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
    share = (step - optim.warmup) / max(total - optim.warmup, 1)
    return optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """After step 1, 2, ...: average = d * average + (1 - d) * module, d at first step / (9 + step), then `decay`. What
    the two share is left alone."""
    d = min(decay, step / (9 + step))
    pairs = [(a, b) for a, b in zip(average.parameters(), module.parameters(), strict=True) if a is not b]
    torch._foreach_lerp_([local(a) for a, _ in pairs], [local(b) for _, b in pairs], 1 - d)
    for a, b in zip(average.buffers(), module.buffers(), strict=True):  # such as those of batch norms
        a.copy_(b)
