"""Replacement of a model's matrices by modules that keep them in another form: fewer bits, or the order of a kernel."""

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

MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]  # weight (E, D), bias (E,) -> x (..., D) -> (..., E)


@torch.no_grad()
def replace_linears(model: nn.Module, make: MakeLinear, make_head: MakeLinear) -> None:
    """Replace every matrix of a model in place by a module that `make` makes of it, those that score the vocabulary by
    `make_head`. Tables of embeddings and routers stay, and so does the matrix that unfolds the latents of latent
    attention."""
    for name, child in list(model.named_children()):
        if isinstance(child, FusedLinear):
            setattr(model, name, PackedFused(child, make))
        elif isinstance(child, Mlp) and child.gate is not None:
            setattr(model, name, PackedMlp(child, make))
        elif isinstance(child, StackedLinear):
            setattr(model, name, PackedStack(child, make))
        elif isinstance(child, nn.Linear) and not isinstance(child, Unfolding):
            setattr(model, name, make(child.weight, child.bias))
        else:
            replace_linears(child, make, make_head)
        if isinstance(child, LMHead):
            setattr(model, name, PackedHead(child, model.embed.tokens.weight, make_head))


class PackedFused(nn.Module):
    """x (..., D) -> one tensor (..., size) per size."""

    def __init__(self, whole: FusedLinear, make: MakeLinear):
        super().__init__()
        self.sizes, self.whole = whole.sizes, make(whole.weight, whole.full_bias())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


class PackedMlp(nn.Module):
    """x (..., D) -> (..., D): a gated MLP whose two projections are one product."""

    def __init__(self, mlp: Mlp, make: MakeLinear):
        super().__init__()
        parts, self.settings, self.inner_norm = (mlp.up, mlp.gate), mlp.settings, mlp.inner_norm
        bias = torch.cat([part.bias for part in parts]) if mlp.settings.up_bias else None
        self.both = make(torch.cat([part.weight for part in parts]), bias)
        self.down = make(mlp.down.weight, mlp.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner_norm(activated(self.settings, *self.both(x).chunk(2, -1))))


class PackedStack(nn.Module):
    """x (M, D) sorted by group -> (M, E), each group by a matrix of its own."""

    def __init__(self, whole: StackedLinear, make: MakeLinear):
        super().__init__()
        biases = whole.bias if whole.bias is not None else [None] * len(whole.weight)
        self.groups = nn.ModuleList(map(make, whole.weight, biases))

    def forward(self, x: Tensor, group: Tensor, ends: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.groups[0].out_features)
        for i, rows in filled(ends):
            out[rows] = self.groups[i](x[rows])
        return out


class PackedHead(nn.Module):
    """x (..., D) -> logits (..., V)."""

    def __init__(self, head: LMHead, table: Tensor, make: MakeLinear):
        super().__init__()
        self.score = make(table if head.weight is None else head.weight, head.bias)
        head.weight = head.bias = None
        self.head = head

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head.finish(self.score(self.head.ready(x)))


# ------------------------------------------------------------------------------ matrices in a compiled step
class PackedWeight:
    """A matrix (E, D) in the order of a kernel. A compiled step cannot hold it, and knows it by its `number`."""

    def __init__(self, value: Any, outputs: int):
        self.value, self.outputs, self.number = value, outputs, next(NUMBERS)
        PACKED[self.number] = self

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        return self


NUMBERS = count()
PACKED: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


def operator(name: str) -> Callable[[Callable[[Tensor, Any], Tensor]], Callable[[Tensor, PackedWeight], Tensor]]:
    """Decorate f(x (..., D), a kernel's matrix) -> (..., E) on a CPU, so that it takes a `PackedWeight` and is an
    operator named `name` in compiled steps."""
    def wrap(f: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, PackedWeight], Tensor]:
        torch.library.define(name, "(Tensor x, int number, int outputs) -> Tensor")
        torch.library.impl(name, "CPU", lambda x, number, outputs: f(x, PACKED[number].value))
        torch.library.register_fake(name, lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs))
        known = getattr(torch.ops.mm, name.removeprefix("mm::")).default

        @wraps(f)
        def call(x: Tensor, packed: PackedWeight) -> Tensor:
            return known(x, packed.number, packed.outputs) if torch.compiler.is_compiling() else f(x, packed.value)
        return call
    return wrap
