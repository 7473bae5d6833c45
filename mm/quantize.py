"""Weights of eight bits for decoding on a CPU.

Every weight row and every token has its own scale: a token's result does not depend on its neighbours in the batch.
Products are exact integers (oneDNN's, on plain tensors), so the same row gives the same bits at any batch size.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from mm.embed import LMHead
from mm.errors import InputError
from mm.grouped import StackedLinear, filled
from mm.linear import FusedLinear

M = TypeVar("M", bound=nn.Module)
LEVELS = 63  # activations fill 7 bits: AVX2 adds pairs of 8-bit products in 16 bits, which 8 would overflow


class Int8Linear(nn.Module):
    """x (..., D) float32 -> (..., E). weight (E, D), bias (E,); kept only in the kernel's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.onednn.qlinear_prepack(levels, None)
        self.scale, self.zero = scale.float(), torch.zeros(len(weight), dtype=torch.long)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        scale = flat.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(LEVELS)
        levels = (flat / scale).round_().add_(LEVELS + 1).to(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(levels, 1.0, LEVELS + 1, self.packed, self.scale, self.zero, None, 1.0,
                                                 0, torch.float32, "none", [], "").mul_(scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


class Int8FusedLinear(nn.Module):
    """x (..., D) -> one tensor (..., size) per size."""

    def __init__(self, whole: FusedLinear):
        super().__init__()
        self.sizes, self.whole = whole.sizes, Int8Linear(whole.weight, whole.full_bias())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


class Int8StackedLinear(nn.Module):
    """x (M, D) sorted by group -> (M, E), each group by a matrix of its own."""

    def __init__(self, whole: StackedLinear):
        super().__init__()
        biases = whole.bias if whole.bias is not None else [None] * len(whole.weight)
        self.groups = nn.ModuleList(map(Int8Linear, whole.weight, biases))

    def forward(self, x: Tensor, group: Tensor, ends: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.groups[0].out_features)
        for i, rows in filled(ends):
            out[rows] = self.groups[i](x[rows])
        return out


class Int8Head(nn.Module):
    """x (..., D) -> logits (..., V)."""

    def __init__(self, head: LMHead, table: Tensor):
        super().__init__()
        self.score = Int8Linear(table if head.weight is None else head.weight, head.bias)
        head.weight = head.bias = None
        self.head = head

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head.finish(self.score(self.head.ready(x)))


def quantize(model: M, to: str = "int8") -> M:
    """The same model, its matrices replaced in place by ones of eight bits: for inference on a CPU in float32. Tables
    of embeddings and routers stay. Raises InputError elsewhere; such a model is not trained or saved."""
    if to != "int8":
        raise InputError(f"weights can be quantised to int8, not {to!r}")
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        raise InputError("int8 weights are for float32 models on the CPU; move the model there first")
    with torch.no_grad():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, FusedLinear):
                    setattr(module, name, Int8FusedLinear(child))
                elif isinstance(child, StackedLinear):
                    setattr(module, name, Int8StackedLinear(child))
                elif isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child.weight, child.bias))
                elif isinstance(child, LMHead):
                    setattr(module, name, Int8Head(child, module.embed.tokens.weight))
    return model.eval()
