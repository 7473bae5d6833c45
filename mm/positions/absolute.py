"""Absolute positions (sinusoids, learned tables) and position biases (ALiBi, T5 buckets)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.errors import InputError
from mm.positions.visibility import At


def sinusoid(positions: Tensor, dim: int, *, theta: float = 10000.0, last: bool = False) -> Tensor:
    """(...) positions -> (..., dim): all sines, then all cosines (Vaswani et al., 2017, in Whisper's order).

    Frequencies run from 1 to 1/theta; `last` includes 1/theta itself (Whisper), otherwise they stop before it.
    """
    if dim % 2:
        raise InputError(f"sinusoids need an even width, not {dim}")
    half = dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - last, 1)
    angle = positions.to(torch.float32).unsqueeze(-1) / theta**exponent
    return torch.cat([angle.sin(), angle.cos()], -1)


@dataclass(frozen=True)
class ByOffset:
    """A bias that depends on key position minus query position alone, for a kernel to compute: what `by_offset` of a
    `Bias` gives. weight: (H,) factors of minus the distance; or (count, H) with buckets (2 * reach + 1,) int32, the
    row of each offset -reach..reach, beyond which the bias stays as it is."""

    weight: Tensor | None
    buckets: Tensor | None = None


class LearnedPositions(nn.Module):
    """positions (B, T) -> (B, T, D). `start` rows of the table come before position 0 (RoBERTa and BART: 2)."""

    def __init__(self, length: int, dim: int, start: int = 0):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(length + start, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions.clamp(min=0) + self.start, self.weight)


class AlibiBias(nn.Module):
    """(q_at, k_at) -> (B, H, T, S): minus slope times distance. Press et al., 2021."""

    def __init__(self, settings: spec.Alibi, heads: int):
        super().__init__()
        self.heads = heads

    def slopes(self, device: torch.device) -> Tensor:
        """(H,): a geometric series for a power of two; for other counts, every second slope of the next power fills up.
        Made on the device, which a copy to it would wait for."""
        whole = 2 ** math.floor(math.log2(self.heads))
        i = torch.arange(1, whole + 1, device=device)
        return torch.cat([torch.exp2(i * (-8 / whole)), torch.exp2((2 * i[:self.heads - whole] - 1) * (-4 / whole))])

    def forward(self, q_at: At, k_at: At) -> Tensor:
        distance = (q_at.position.unsqueeze(-1) - k_at.position.unsqueeze(-2)).abs().unsqueeze(1)
        return -distance * self.slopes(distance.device)[:, None, None]

    def by_offset(self, device: torch.device) -> ByOffset:
        return ByOffset(self.slopes(device))


class BucketBias(nn.Module):
    """(q_at, k_at) -> (B, H, T, S): one learned value per head and distance bucket. Raffel et al., 2020 (T5)."""

    def __init__(self, settings: spec.Buckets, heads: int):
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.count, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def bucket(self, offset: Tensor) -> Tensor:
        """Key position minus query position -> bucket: exact while near, logarithmic further away."""
        count, first = self.settings.count, 0
        if self.settings.two_sided:
            count //= 2
            first, offset = (offset > 0) * count, offset.abs()
        else:
            offset = (-offset).clamp(min=0)
        near = count // 2
        far = torch.log(offset.float().clamp(min=1) / near) / math.log(self.settings.distance / near) * (count - near)
        return first + torch.where(offset < near, offset, (near + far.long()).clamp(max=count - 1))

    def forward(self, q_at: At, k_at: At) -> Tensor:
        offset = k_at.position.unsqueeze(-2) - q_at.position.unsqueeze(-1)
        return F.embedding(self.bucket(offset), self.weight).permute(0, 3, 1, 2)

    def by_offset(self, device: torch.device) -> ByOffset:
        reach = self.settings.distance
        return ByOffset(self.weight, self.bucket(torch.arange(-reach, reach + 1, device=device)).int())


def build_bias(settings: spec.Alibi | spec.Buckets | None, heads: int) -> nn.Module | None:
    kinds = {spec.Alibi: AlibiBias, spec.Buckets: BucketBias}
    return None if settings is None else kinds[type(settings)](settings, heads)
