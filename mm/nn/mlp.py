"""The position-wise half of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.nn.linear import Linear, multiply
from mm.nn.norm import build_norm


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """So et al., 2021 (Primer)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "relu": F.relu, "relu2": relu2,
}


def activated(settings: spec.Mlp, up: Tensor, gate: Tensor | None) -> Tensor:
    """What goes on to `down`, from one projection of the input or, where the unit is gated, two."""
    act = ACTIVATIONS[settings.act]
    if gate is None:
        return act(up)
    if settings.clamp is not None:
        limit = settings.clamp.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + settings.clamp.shift
    return multiply(act(gate), up)


class Mlp(nn.Module):
    """x: (..., D) -> (..., D)."""

    def __init__(self, dim: int, settings: spec.Mlp):
        super().__init__()
        self.settings = settings
        self.up = Linear(dim, settings.hidden, bias=settings.up_bias)
        self.gate = Linear(dim, settings.hidden, bias=settings.up_bias) if settings.gated else None
        self.inner_norm = build_norm(settings.inner_norm, settings.hidden)
        self.down = Linear(settings.hidden, dim, bias=settings.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activated(self.settings, self.up(x), None if self.gate is None else self.gate(x))
        hidden = F.dropout(self.inner_norm(hidden), self.settings.dropout, self.training)
        return self.down(hidden)
