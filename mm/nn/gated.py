"""A gated MLP in training, for less memory: what `down` reads is made again on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.nn.linear import each


def silu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x (K, N, D), up (K, 2 H, D), gate before up, and down (K, D, H) -> (K, N, D). A graph is gone through once."""
    return SiluMlp.apply(x, up, down)


class SiluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, down)
        ctx.both, out = [], []
        for part, to_both, to_out in in_pieces(x, up, down):
            ctx.both.append(each(part, to_both))
            out.append(each(lit(ctx.both[-1]), to_out))
        return torch.cat(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (x, up, down), held, grads = ctx.saved_tensors, ctx.both[::-1], ([], [], [])
        ctx.both = None
        for part, to_both, to_out, onto in in_pieces(x, up, down, slope):
            both = held.pop()
            grads[2].append(each(onto.mT, lit(both).mT) if ctx.needs_input_grad[2] else None)
            turn_back(both, each(onto, to_out.mT))
            grads[0].append(each(both, to_both.mT) if ctx.needs_input_grad[0] else None)
            grads[1].append(each(part.mT, both.mT).mT if ctx.needs_input_grad[1] else None)
        return tuple(torch.cat(made) if needed else None for made, needed in zip(grads, ctx.needs_input_grad,
                                                                                strict=True))


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Step by step on a CPU, whose cache holds one of them, otherwise all steps at once."""
    size = 1 if tensors[0].device.type == "cpu" else len(tensors[0])
    return zip(*(one.split(size) for one in tensors), strict=True)


def lit(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)


def turn_back(both: Tensor, slope: Tensor) -> None:
    """Makes `both` its own gradient from that of `lit`, whose memory is used."""
    gate, up = both.chunk(2, -1)
    to_up = F.silu(gate).mul_(slope)
    slope.mul_(up)
    up.copy_(to_up)
    torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=gate)
