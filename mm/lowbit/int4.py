"""Weights of four bits for decoding on a CPU: a quarter of the memory of bfloat16, in groups of 32 inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # as in GGUF's Q4_0 and Q4_1
LEVELS, MIDDLE = 15, 8
ROWS = 16  # the kernel wants a multiple of this many outputs


class Int4Linear(nn.Module):
    """x (..., D) float32 -> (..., E). weight (E, D), bias (E,).

    Each group of 32 weights of a row has 16 levels; Q4_0 and Q4_1 files keep those they came with. The step and the
    middle of a group are kept in bfloat16, in which products are taken too. A row's result does not depend on its
    neighbours in the batch; that of a model in chunks differs from the whole as it does in bfloat16. Long prompts are
    read slower than in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.short = -self.in_features % GROUP  # zeros that complete the last group
        weight = F.pad(weight.float(), (0, self.short, 0, -self.out_features % ROWS))
        levels, scale, middle = nearest(weight.unflatten(1, (-1, GROUP)))
        self.scales = torch.stack([scale, middle], -1).transpose(0, 1).contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).to(torch.int32), 1)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        flat = F.pad(x.reshape(-1, self.in_features), (0, self.short)).bfloat16()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scales)
        out = out[:, : self.out_features].to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int4"


def nearest(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (E, G, 32) as levels 0 to 15, and the step and middle (E, G) in bfloat16 of the better of two grids: from
    the smallest to the largest weight (Q4_1), or eight steps of zero on the side of the largest magnitude (Q4_0)."""
    low, high = groups.amin(-1), groups.amax(-1)
    far = torch.maximum(high, -low)
    grids = [rounded(groups, low, (high - low) / LEVELS),
             rounded(groups, torch.where(high >= -low, -7 / 8 * far, -far), far / 8)]
    errors = [(middled(*grid) - groups).square().sum(-1) for grid in grids]
    first = errors[0] <= errors[1]
    return tuple(torch.where(first[..., None] if a.ndim == 3 else first, a, b) for a, b in zip(*grids, strict=True))


def rounded(groups: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    step = step.clamp(min=1e-12).bfloat16()
    levels = ((groups - low[..., None]) / step.float()[..., None]).round_().clamp_(0, LEVELS)
    return levels, step, (low + MIDDLE * step.float()).bfloat16()


def middled(levels: Tensor, step: Tensor, middle: Tensor) -> Tensor:
    """The weights that the kernel multiplies by."""
    return (levels - MIDDLE) * step.float()[..., None] + middle.float()[..., None]
