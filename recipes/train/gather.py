"""Features of other processes, with gradient: contrastive losses over the batch of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..clip.loss import siglip_loss


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


def mean_over_processes(x: Tensor) -> Tensor:
    """() -> (), without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
