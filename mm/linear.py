"""Several projections of one input as a single matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """x: (..., D) -> one tensor (..., size) per size. `bias` holds the parts that have one, in order."""

    def __init__(self, dim: int, sizes: tuple[int, ...], biases: tuple[bool, ...]):
        super().__init__()
        self.dim, self.sizes, self.biases = dim, sizes, biases
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))
        held = sum(size for size, has in zip(sizes, biases, strict=True) if has)
        self.bias = nn.Parameter(torch.empty(held)) if held else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def full_bias(self) -> Tensor | None:
        """(sum of sizes,), zero where a part has none."""
        if self.bias is None or all(self.biases):
            return self.bias
        held = iter(self.bias.split([s for s, has in zip(self.sizes, self.biases, strict=True) if has]))
        return torch.cat([next(held) if has else self.bias.new_zeros(size)
                          for size, has in zip(self.sizes, self.biases, strict=True)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.full_bias()).split(self.sizes, -1)

    def extra_repr(self) -> str:
        return f"{self.dim} -> {self.sizes}, biases={self.biases}"
