"""The second half of a gated MLP in training, for less memory: what `down` reads is made again on the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.linear import each


def silu_down(both: Tensor, weight: Tensor) -> Tensor:
    """both (K, N, 2 H), gate beside up, and weight (K, D, H) -> silu(gate) * up times the weight, (K, N, D). The caller
    gives `both` away: it is all that is kept, and becomes its own gradient, so a graph is gone through once."""
    return SiluDown.apply(both, weight)


class SiluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        ctx.both = both
        ctx.save_for_backward(weight)
        gate, up = both.chunk(2, -1)
        return each(F.silu(gate).mul_(up), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None]:
        (weight,), both, ctx.both = ctx.saved_tensors, ctx.both, None
        gate, up = both.chunk(2, -1)
        made = each(slope.mT, F.silu(gate).mul_(up).mT) if ctx.needs_input_grad[1] else None
        inner = each(slope, weight.mT)
        to_up = F.silu(gate).mul_(inner)
        inner.mul_(up)
        up.copy_(to_up)
        torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=gate)
        return both, made
