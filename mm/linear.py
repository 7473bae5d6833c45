"""Matrix products: one projection, or several of one input at once, by the fastest kernel with the same result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 18  # weights; below, the call costs more than the kernel gains
FEW = 32  # tokens, for which a weight must be four times as large
MANY = 16  # tokens, from which on transposed weights gain nothing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), weight (E, D), bias (E,) -> (..., E).

    Float32 on a CPU without gradients goes to oneDNN where it is faster than the BLAS behind `F.linear`, up to twice:
    not for one or two tokens, nor for many by weights that `mm.arrange` transposed."""
    if faster_in_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def faster_in_onednn(x: Tensor, weight: Tensor) -> bool:
    if (torch.is_grad_enabled() or torch.compiler.is_compiling() or not ONEDNN or weight.device.type != "cpu"
            or not weight.dtype == x.dtype == torch.float32 or type(x) is not Tensor
            or type(weight) not in (Tensor, nn.Parameter) or torch.is_autocast_enabled("cpu")):
        return False
    rows = x.numel() // weight.shape[1]
    if weight.stride(0) == 1:
        return 2 < rows < MANY
    return rows > 2 and weight.numel() >= (LARGE if rows > FEW else 4 * LARGE)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """x: (..., D) -> (..., E)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; in the memory of x, which the caller gives away, where no gradient is recorded."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else x.add_(y)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y; in the memory of x, which the caller gives away, where no gradient is recorded."""
    return x * y if torch.is_grad_enabled() or x.dtype != y.dtype else x.mul_(y)


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
        return linear(x, self.weight, self.full_bias()).split(self.sizes, -1)

    def extra_repr(self) -> str:
        return f"{self.dim} -> {self.sizes}, biases={self.biases}"
