"""Keeping experts equally busy: losses and a bias update from the routes of one forward pass.

`model.hidden(ids, routes=routes)` appends a `Route` per mixture, in layer order, to a list; each function here takes
one of them. mask: True where a token counts, (B, T) or flat (N,); None counts all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.nn.moe import Moe, Route


def load(route: Route, mask: Tensor | None = None) -> Tensor:
    """(X,) the number of tokens that each expert was chosen for. It may be summed over micro-batches and processes."""
    experts = route.logits.shape[-1]
    busy = torch.zeros(experts, dtype=route.logits.dtype, device=route.logits.device)
    ones = weights_of(route, mask).unsqueeze(-1).expand(route.chosen.shape)
    return busy.scatter_add(0, route.chosen.flatten(), ones.flatten())


def balance_loss(route: Route, mask: Tensor | None = None) -> Tensor:
    """X times the sum over experts of (share of tokens that chose it) x (mean softmax probability): `chosen` where all
    are equally busy, more elsewhere. Fedus et al., 2021 (Switch), equations 4 to 6, for any number of choices."""
    counts = weights_of(route, mask)
    total = counts.sum().clamp(min=1)
    share = load(route, mask) / total
    probability = (route.logits.softmax(-1) * counts.unsqueeze(-1)).sum(0) / total
    return route.logits.shape[-1] * (share * probability).sum()


def z_loss(route: Route, mask: Tensor | None = None) -> Tensor:
    """The mean squared logsumexp of the router's logits, which keeps them small. Zoph et al., 2022 (ST-MoE)."""
    counts = weights_of(route, mask)
    return (route.logits.logsumexp(-1).square() * counts).sum() / counts.sum().clamp(min=1)


@torch.no_grad()
def move_corrections(model: nn.Module, loads: Sequence[Tensor], speed: float = 1e-3) -> None:
    """Raise by `speed` the correction of every expert with less than the mean load, lower that of those with more
    (DeepSeek-V3's balancing without a loss). model: what gave the routes, such as a decoder's `stack`; loads: a (X,)
    `load` per mixture in it, in layer order; mixtures without a correction stay. Raises InputError for another number
    or shape of loads."""
    mixtures = [module for module in model.modules() if isinstance(module, Moe)]
    wanted, given = [(moe.settings.experts,) for moe in mixtures], [tuple(one.shape) for one in loads]
    if wanted != given:
        raise InputError(f"a model with {len(mixtures)} mixtures of {sizes(wanted)} experts needs a load for each, not "
                         f"{len(given)} of {sizes(given)}")
    for moe, busy in zip(mixtures, loads, strict=True):
        if moe.router.correction is not None:
            step = (busy.mean() - busy).sign()
            moe.router.correction.add_(step.to(moe.router.correction.dtype), alpha=speed)


def weights_of(route: Route, mask: Tensor | None) -> Tensor:
    """(N,) 1 for a token that counts, 0 for another. Raises InputError for a mask of another size."""
    if mask is None:
        return route.logits.new_ones(len(route.logits))
    if mask.numel() != len(route.logits):
        raise InputError(f"a mask {tuple(mask.shape)} does not fit the routes of {len(route.logits)} tokens")
    return mask.reshape(-1).to(route.logits.dtype)


def sizes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(dict.fromkeys("x".join(map(str, shape)) for shape in shapes)) or "no"
