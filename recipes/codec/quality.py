"""How close a decoded sound is to the original."""

from __future__ import annotations

import torch
from torch import Tensor


def si_sdr(x: Tensor, y: Tensor) -> Tensor:
    """x, y (..., L), y the original -> (...) dB: the scale-invariant ratio of signal to distortion (Le Roux et al.,
    2019), of sounds without their means."""
    x, y = (part.double() - part.double().mean(-1, keepdim=True) for part in (x, y))
    tiny = torch.finfo(torch.float64).tiny
    target = (x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True).clamp(min=tiny) * y
    rest = (x - target).square().sum(-1).clamp(min=tiny)
    return 10 * (target.square().sum(-1).clamp(min=tiny) / rest).log10()


def used(codes: Tensor, size: int) -> float:
    """codes (Q, T) -> the share of the entries of all codebooks that occur (%)."""
    return 100 * sum(len(row.unique()) for row in codes) / (len(codes) * size)
