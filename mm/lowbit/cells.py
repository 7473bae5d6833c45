"""A model's matrices replaced by cells, which keep them in their own form: in few bits, or in the order of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mm.nn.embed import LMHead
from mm.nn.grouped import StackedLinear, filled
from mm.nn.latent import Unfolding
from mm.nn.linear import FusedLinear
from mm.nn.mlp import Mlp, activated


class Kept:
    """A matrix (E, D) in the order of a kernel, by its number for a compiled step, which cannot hold it."""

    def __init__(self, value: Any, outputs: int):
        self.value, self.outputs, self.number = value, outputs, next(NUMBERS)
        KEPT[self.number] = self

    def __deepcopy__(self, memo: dict) -> Kept:
        return self


NUMBERS = count()
KEPT: WeakValueDictionary[int, Kept] = WeakValueDictionary()


def operator(name: str) -> Callable[[Callable[[Tensor, Any], Tensor]], Callable[[Tensor, Kept], Tensor]]:
    """Makes of f(x (..., D), a kernel's matrix) -> (..., E) on a CPU one of x and a `Kept` matrix, into which
    `torch.compile` does not look."""
    def wrap(f: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Kept], Tensor]:
        torch.library.define(name, "(Tensor x, int number, int outputs) -> Tensor")
        torch.library.impl(name, "CPU", lambda x, number, outputs: f(x, KEPT[number].value))
        torch.library.register_fake(name, lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs))
        known = getattr(torch.ops.mm, name.removeprefix("mm::")).default

        @wraps(f)
        def call(x: Tensor, kept: Kept) -> Tensor:
            return known(x, kept.number, kept.outputs) if torch.compiler.is_compiling() else f(x, kept.value)
        return call
    return wrap


Cell = Callable[[Tensor, Tensor | None], nn.Module]  # of a weight (E, D) and a bias (E,)


class Fused(nn.Module):
    """x (..., D) -> one tensor (..., size) per size."""

    def __init__(self, whole: FusedLinear, cell: Cell):
        super().__init__()
        self.sizes, self.whole = whole.sizes, cell(whole.weight, whole.full_bias())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


class Gated(nn.Module):
    """x (..., D) -> (..., D): a gated MLP whose two projections are one product."""

    def __init__(self, mlp: Mlp, cell: Cell):
        super().__init__()
        parts, self.settings, self.inner_norm = (mlp.up, mlp.gate), mlp.settings, mlp.inner_norm
        bias = torch.cat([part.bias for part in parts]) if mlp.settings.up_bias else None
        self.both = cell(torch.cat([part.weight for part in parts]), bias)
        self.down = cell(mlp.down.weight, mlp.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner_norm(activated(self.settings, *self.both(x).chunk(2, -1))))


class Stacked(nn.Module):
    """x (M, D) sorted by group -> (M, E), each group by a matrix of its own."""

    def __init__(self, whole: StackedLinear, cell: Cell):
        super().__init__()
        biases = whole.bias if whole.bias is not None else [None] * len(whole.weight)
        self.groups = nn.ModuleList(map(cell, whole.weight, biases))

    def forward(self, x: Tensor, group: Tensor, ends: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.groups[0].out_features)
        for i, rows in filled(ends):
            out[rows] = self.groups[i](x[rows])
        return out


class Head(nn.Module):
    """x (..., D) -> logits (..., V)."""

    def __init__(self, head: LMHead, table: Tensor, cell: Cell):
        super().__init__()
        self.score = cell(table if head.weight is None else head.weight, head.bias)
        head.weight = head.bias = None
        self.head = head

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head.finish(self.score(self.head.ready(x)))


@torch.no_grad()
def replace(model: nn.Module, cell: Cell, head: Cell) -> None:
    """Every matrix by what `cell` makes of it, those that score the vocabulary by what `head` does. Tables of
    embeddings and routers stay, and what unfolds the latents of latent attention."""
    for name, child in list(model.named_children()):
        if isinstance(child, FusedLinear):
            setattr(model, name, Fused(child, cell))
        elif isinstance(child, Mlp) and child.gate is not None:
            setattr(model, name, Gated(child, cell))
        elif isinstance(child, StackedLinear):
            setattr(model, name, Stacked(child, cell))
        elif isinstance(child, nn.Linear) and not isinstance(child, Unfolding):
            setattr(model, name, cell(child.weight, child.bias))
        elif isinstance(child, LMHead):
            replace(child, cell, head)
            setattr(model, name, Head(child, model.embed.tokens.weight, head))
        else:
            replace(child, cell, head)
