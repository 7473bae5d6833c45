"""The second half of a gated MLP in training, for less memory: what `down` reads is made again on the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_down(both: Tensor, weight: Tensor) -> Tensor:
    """both (K, N, 2 H), gate beside up, and weight (K, D, H) -> silu(gate) * up times the weight, (K, N, D). Keeps
    `both` for the gradient, not the product."""
    return SiluDown.apply(both, weight)


class SiluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight)
        gate, up = both.chunk(2, -1)
        return torch.bmm(F.silu(gate).mul_(up), weight.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        both, weight = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        passed, made = F.silu(gate), None
        if ctx.needs_input_grad[1]:
            made = torch.bmm(slope.mT, passed * up)
        if not ctx.needs_input_grad[0]:
            return None, made
        inner, out = torch.bmm(slope, weight), torch.empty_like(both)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(inner, passed, out=to_up)
        torch.ops.aten.silu_backward.grad_input(inner.mul_(up), gate, grad_input=to_gate)
        return out, made
