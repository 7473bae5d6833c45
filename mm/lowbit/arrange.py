"""Weights in the order in which a CPU decodes fastest."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.lowbit.cells import Kept, operator, replace
from mm.nn.embed import LMHead
from mm.nn.linear import ONEDNN, FusedLinear
from mm.speech.depth import StepLinear

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def arrange(model: M) -> M:
    """The same model for decoding one row at a time on a CPU: matrices with more outputs than inputs are transposed in
    memory, where the product with one token then takes two thirds of the time (a compiled step is faster without).
    Names, shapes and values stay; results differ by rounding. To be called before an optimizer is made of the model,
    and not before FSDP shards it."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, LMHead) and weight is None:
            weight = model.embed.tokens.weight
        if isinstance(module, nn.Linear | FusedLinear | LMHead | StepLinear) and weight.shape[-2] > weight.shape[-1]:
            weight.data = weight.mT.contiguous().mT
    return model


def arrange_for_rows(model: M) -> M:
    """The same float32 model for decoding four rows or more at a time on a CPU: matrices move into the blocks in which
    oneDNN reads them, up to twice as fast. Results differ by rounding; the model is not trained or saved any more.
    Raises InputError for another device or dtype, and without oneDNN."""
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if kinds != {("cpu", torch.float32)} or not ONEDNN:
        raise InputError(f"weights move into blocks in float32 on a CPU with oneDNN, not as {sorted(map(str, kinds))}")
    replace(model, BlockedLinear, BlockedLinear)
    return model.eval()


class BlockedLinear(nn.Module):
    """x (..., D) float32 -> (..., E). weight (E, D), bias (E,); kept only in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocks = Kept(torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS), len(weight))
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out = product(x, self.blocks)
        return out if self.bias is None else out.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, in blocks"


@operator("mm::blocked_product")
def product(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


ROWS = 256  # tokens for which oneDNN chooses the blocks, which serve four as well
