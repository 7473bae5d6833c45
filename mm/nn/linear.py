"""Matrix products: one projection, or several of one input at once, by the fastest kernel with the same result."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 1 << 18  # weights; below, the call costs more than the kernel gains
FEW = 32  # tokens, for which a weight must be four times as large
WORK = 1 << 23  # multiplications, from which the call is worth it for more tokens
SHORT = 3 << 10  # numbers of a few tokens together, up to which BLAS reads a weight once for all of them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), weight (E, D), bias (E,) -> (..., E).

    Float32 on a CPU without gradients takes the fastest of three kernels, as measured: the BLAS behind `F.linear`, the
    same with the tokens as columns, which reads weights up to twice as fast for two to six short ones, and oneDNN. One
    token in a compiled step is a loop of its own, which reads weights at the speed of memory. With gradients it is BLAS
    or, for much work, oneDNN, there and back."""
    if torch.compiler.is_compiling():
        return one_token(x, weight, bias) if loops(x, weight) else F.linear(x, weight, bias)
    rows = x.numel() // weight.shape[1]
    if rows < 2 or not plain(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return Product.apply(x, weight, bias) if worth_it(rows, weight) else F.linear(x, weight, bias)
    if faster_as_columns(rows, weight):
        out = torch.mm(weight, x.reshape(rows, -1).contiguous().t()).t().contiguous()
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)
    if faster_in_onednn(rows, weight):
        return in_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def each(x: Tensor, weight: Tensor) -> Tensor:
    """x (K, N, D), weight (K, E, D) -> (K, N, E): as one call, or by oneDNN one after the other."""
    if len(x) == 1:
        return linear(x[0], weight[0]).unsqueeze(0)
    if torch.compiler.is_compiling() or not plain(x, weight) or not worth_it(x.shape[1], weight[0]):
        return torch.bmm(x, weight.mT)
    return torch.stack([linear(*pair) for pair in zip(x.unbind(), weight.unbind(), strict=True)])


def in_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`linear` in oneDNN, whose gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return in_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        return (linear(slope, weight.t()) if needed[0] else None, outer(slope, x) if needed[1] else None,
                slope.flatten(0, -2).sum(0) if needed[2] else None)


def outer(slope: Tensor, x: Tensor) -> Tensor:
    """slope (..., E), x (..., D) -> (E, D), the sum of their outer products: what a weight's gradient is. oneDNN reads
    one of them turned over, at best the narrower."""
    slope, x = (one.reshape(-1, one.shape[-1]).contiguous() for one in (slope, x))
    if slope.shape[1] <= x.shape[1]:
        return linear(slope.t(), x.t())
    return linear(x.t(), slope.t()).t().contiguous()


def loops(x: Tensor, weight: Tensor) -> bool:
    return (not torch.is_grad_enabled() and not torch.compiler.is_exporting() and weight.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and x.numel() == weight.shape[1] == weight.stride(0))


def one_token(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = (weight * x.reshape(1, -1)).sum(-1).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def plain(x: Tensor, weight: Tensor) -> bool:
    """Float32 on a CPU with no more to it than its numbers."""
    return (weight.device.type == "cpu" and weight.dtype == x.dtype == torch.float32 and type(x) is Tensor
            and type(weight) in (Tensor, nn.Parameter) and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active())


def faster_as_columns(rows: int, weight: Tensor) -> bool:
    return rows * weight.shape[1] <= SHORT and weight.numel() >= LARGE and weight.is_contiguous()


def faster_in_onednn(rows: int, weight: Tensor) -> bool:
    if weight.stride(0) == 1:  # as `mm.lowbit.arrange` leaves it
        return ONEDNN and rows > 2
    return worth_it(rows, weight) if rows > FEW else ONEDNN and weight.numel() >= 4 * LARGE


def worth_it(rows: int, weight: Tensor) -> bool:
    return ONEDNN and rows * weight.numel() >= WORK


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


class StepLinear(nn.Module):
    """x: (K, N, D) -> (K, N, E), step k by `weight[sets[k]]`."""

    def __init__(self, sets: tuple[int, ...], dim: int, out: int, bias: bool = False):
        super().__init__()
        self.sets, count = sets, max(sets) + 1
        self.weight = nn.Parameter(torch.empty(count, out, dim))
        self.bias = nn.Parameter(torch.empty(count, out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:
            return linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        weight, bias = self.of_steps(self.weight), self.bias
        out = each(x, weight)
        return out if bias is None else out + self.of_steps(bias).unsqueeze(1)

    def of_steps(self, held: Tensor) -> Tensor:
        """(sets, ...) -> (K, ...)"""
        return held if self.sets == tuple(range(len(held))) else held[constant(self.sets, held.device)]

    def step(self, x: Tensor, k: int) -> Tensor:
        """x: (B, D) -> (B, E)."""
        i = self.sets[k]
        return linear(x, self.weight[i], None if self.bias is None else self.bias[i])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[2]} -> {self.weight.shape[1]}, {len(self.weight)} sets"


@cache
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers (S,) as a tensor that is made once per device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.long, device=device)
