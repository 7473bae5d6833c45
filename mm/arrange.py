"""Weights in the order in which a CPU decodes fastest."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from mm.depth import StepLinear
from mm.embed import LMHead
from mm.linear import FusedLinear

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
