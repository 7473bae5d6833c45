"""One matrix product per group of rows: what a mixture of experts computes when its rows are sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, D) sorted by group, weight (G, E, D), ends (G,) int32: where each group's rows stop -> (M, E).

    bfloat16 on a GPU is one grouped kernel that waits for nothing; otherwise a loop over the groups that have rows.
    Under autocast x and weight are cast as by any linear layer."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = weight.shape[1] % 8 == weight.shape[2] % 8 == 0  # rows of whole 16 bytes
    if kind == "cuda" and x.dtype == weight.dtype == torch.bfloat16 and aligned:
        return by_kernel(x, weight, ends)
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return products(x, weight, ends) if plain else by_group(x, weight, ends)


def by_kernel(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product per group that has rows, each into its place: half the time of a copy where one token is decoded."""
    out = x.new_empty(len(x), weight.shape[1])
    for group, rows in filled(ends):
        torch.mm(x[rows], weight[group].T, out=out[rows])
    return out


@torch.library.custom_op("mm::grouped_linear", mutates_args=())
def by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`products` with gradients, and an operator into which `torch.compile` and `torch.export` need not look."""
    return products(x, weight, ends)


@by_group.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("mm::grouped_linear_backward", mutates_args=())
def by_group_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; a group without rows gets zeros."""
    x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
    for group, rows in filled(ends):
        torch.mm(grad[rows], weight[group], out=x_grad[rows])
        torch.mm(grad[rows].T, x[rows], out=weight_grad[group])
    return x_grad, weight_grad


@by_group_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def spread(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *by_group_backward(grad.contiguous(), *ctx.saved_tensors), None


by_group.register_autograd(spread, setup_context=keep)


def filled(ends: Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows, each with its rows."""
    stops = ends.tolist()
    return [(group, slice(start, stop)) for group, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
            if stop > start]


class StackedLinear(nn.Module):
    """x (M, D) sorted by group -> (M, E): `groups` linear layers in one weight (G, E, D), bias (G, E).

    Sharded by its first dimension, every process holds whole experts; by the others, as any linear layer."""

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, group: Tensor, ends: Tensor) -> Tensor:
        """group (M,): that of each row; ends (G,) int32: where each group's rows stop."""
        out = grouped_linear(x, self.weight, ends)
        return out if self.bias is None else out + self.bias[group].to(out.dtype)

    def extra_repr(self) -> str:
        groups, outputs, inputs = self.weight.shape
        return f"{groups} x ({inputs} -> {outputs}), bias={self.bias is not None}"
