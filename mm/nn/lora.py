"""Low-rank adaptation of linear layers (LoRA, Hu et al., 2021), of any module; merged, it leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.nn.grouped import StackedLinear
from mm.nn.linear import FusedLinear, StepLinear

LINEAR = nn.Linear | FusedLinear | StackedLinear | StepLinear


class LowRank(nn.Module):
    """weight (..., out, D) -> weight + alpha / rank * up @ down, where every part of a fused weight, and every expert
    or step of stacked ones, has a pair of its own.

    `down` (parts, rank, D) starts random, `up` (out, rank) at zero, so that nothing changes at first.
    """

    def __init__(self, weight: Tensor, sizes: Sequence[int], rank: int, alpha: float):
        super().__init__()
        self.sizes, self.scale = tuple(sizes), alpha / rank
        dtype = torch.promote_types(weight.dtype, torch.float32)  # half precision would lose small steps
        new = {"dtype": dtype, "device": weight.device}
        self.down = nn.Parameter(torch.randn(len(self.sizes), rank, weight.shape[-1], **new) * weight.shape[-1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(sum(self.sizes), rank, **new))

    def forward(self, weight: Tensor) -> Tensor:
        parts = [up @ down for up, down in zip(self.up.split(self.sizes), self.down, strict=True)]
        return weight + (self.scale * torch.cat(parts)).view_as(weight).to(weight.dtype)


class Adapted:
    """Mixed into the class of a linear layer: its `weight` is the changed one; in the state are `base`, `lora.down` and
    `lora.up`."""

    @property
    def weight(self) -> Tensor:
        return self.lora(self.base)


@cache
def adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"plain": kind})


def add_lora(module: nn.Module, rank: int = 8, alpha: float = 16.0, layers: Sequence[str] = ()) -> list[str]:
    """Freeze a module and let low-rank changes of its linear layers train; gives the names of these layers.

    `layers` are ends of dotted names, such as "qkv" or "mlp.up" (none: every linear layer). Everyone who reads an
    adapted layer's `weight` sees the changed one. Raises InputError for a name that no linear layer has.
    """
    if rank < 1 or alpha <= 0:
        raise InputError(f"LoRA needs a positive rank and alpha, not {rank} and {alpha}")
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, LINEAR)}
    if not linear:
        raise InputError(f"a {type(module).__name__} has no linear layer that LoRA could adapt")
    for end in layers:
        if not any(ends(name, end) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise InputError(f"LoRA: no linear layer is called {end!r}; there are {known}")
    module.requires_grad_(False)
    chosen = [name for name in linear if not layers or any(ends(name, end) for end in layers)]
    for name in chosen:
        layer = linear[name]
        if isinstance(layer, Adapted):
            raise InputError(f"LoRA: {name or type(layer).__name__} is adapted already; merge it first")
        layer.lora = LowRank(layer.weight, parts(layer), rank, alpha)
        layer.base = layer._parameters.pop("weight")
        layer.__class__ = adapted(type(layer))
    return chosen


def parts(layer: nn.Module) -> list[int]:
    """The outputs of each matrix in a layer's weight."""
    if isinstance(layer, FusedLinear):
        return list(layer.sizes)
    *groups, outputs, _ = layer.weight.shape
    return [outputs] * math.prod(groups)


def ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """The low-rank tensors alone, by their names in the module's state: what training has to keep."""
    return dict(_tensors(module))


def load_lora_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the low-rank tensors of a module that `add_lora` prepared. Raises InputError unless they fit exactly."""
    own = dict(_tensors(module))
    odd = sorted(own.keys() ^ state.keys())
    if odd:
        raise InputError(f"LoRA weights do not fit the module: {odd[0]} is on one side only")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(f"LoRA weights do not fit the module: {name} is {tuple(state[name].shape)}, "
                             f"expected {tuple(tensor.shape)}")
        tensor.copy_(state[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for place, part in module.named_modules():
        if isinstance(part, LowRank):
            yield from ((f"{place}.{name}", parameter.detach()) for name, parameter in part.named_parameters())


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Put every low-rank change into its weight: a plain module again, still frozen, that computes the same."""
    for layer in list(module.modules()):
        if isinstance(layer, Adapted):
            weight = layer.weight  # a new tensor: the base may be shared with a copy of the module
            del layer.lora, layer.base
            layer.__class__ = layer.plain
            layer.weight = nn.Parameter(weight, requires_grad=False)
