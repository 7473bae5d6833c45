"""Contrastive losses of a whole batch at the memory of a part of it: rows through the towers a chunk at a time
(GradCache, Gao et al., 2021), and features of other processes, with gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..clip.loss import siglip_loss


def in_chunks(tower: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """tower(x), `chunk` rows at a time (None: all), of which the backward pass keeps the features alone.

    Whatever loss follows sees all rows at once, and its backward pass runs the tower again on each chunk, under the
    random numbers that it had: every gradient, of the loss's own parameters too, is that of the whole batch. The last
    chunk is kept as it is, since its backward pass comes first.
    """
    parts = x.split(chunk or len(x))
    if not torch.is_grad_enabled() or len(parts) == 1:
        return torch.cat([tower(part) for part in parts])
    again = [checkpoint(tower, part, use_reentrant=False) for part in parts[:-1]]
    return torch.cat([*again, tower(parts[-1])])


class Passed(torch.autograd.Function):
    """Hands a tensor to the next process and takes the previous one's; gradients travel the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return exchange(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return exchange(grad, -1)


def exchange(x: Tensor, step: int) -> Tensor:
    """The tensor of the process `step` places before; ours goes as many places on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, taken = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    pair = [dist.P2POp(dist.isend, x, (rank + step) % world), dist.P2POp(dist.irecv, taken, (rank - step) % world)]
    for work in dist.batch_isend_irecv(pair):
        work.wait()
    return taken


def siglip_ring(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, group: Tensor) -> Tensor:
    """This process's share of the sigmoid loss: its images (B, E) against the texts of all processes, which go round
    from neighbour to neighbour, so that none ever holds more than two processes' texts. The mean of the shares is the
    loss of the whole batch, and DDP's mean of their gradients its gradient. `group` has to tell rows of different
    processes apart."""
    total, other, own = 0.0, text, group
    for place in range(dist.get_world_size()):
        if place:
            other, own = Passed.apply(other), exchange(own, 1)
        total = total + siglip_loss(image, other, logit_scale, logit_bias, group, own)
    return total
