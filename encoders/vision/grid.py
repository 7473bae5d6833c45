"""Positions of patches on a grid: rotary coordinates, sinusoids, and tables resampled to another grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError
from mm.positions.absolute import sinusoid


def index_grid(height: int, width: int, *, order: str = "yx", reference: tuple[int, int] | None = None,
               offset: float = 0.0, device: torch.device | None = None) -> Tensor:
    """Return (height * width, 2) coordinates of patches in row order; `reference` stretches the grid to that (h, w)."""
    ys = torch.arange(height, device=device, dtype=torch.float32) + offset
    xs = torch.arange(width, device=device, dtype=torch.float32) + offset
    if reference is not None:
        ys, xs = ys / height * reference[0], xs / width * reference[1]
    return product(ys, xs, order)


def centred_grid(height: int, width: int, *, normalise: str = "separate", device: torch.device | None = None) -> Tensor:
    """Return (height * width, 2) patch centres (y, x) in [-1, 1]; `normalise` divides by each side, or by
    the `min` or the `max` side (DINOv3)."""
    sides = (height, width) if normalise == "separate" else (dict(min=min, max=max)[normalise](height, width),) * 2
    ys = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / sides[0]
    xs = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / sides[1]
    return product(2 * ys - 1, 2 * xs - 1, "yx")


def jitter(coords: Tensor, *, shift: float = 0.0, stretch: float = 1.0, rescale: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """Move centred coords (N, 2) at random, as DINOv3 does in training: a shift in [-shift, shift] per axis, a
    log-uniform factor up to `stretch` per axis, and one shared log-uniform factor up to `rescale`."""
    def uniform(count: int, edge: float) -> Tensor:
        draw = torch.rand(count, device=coords.device, dtype=coords.dtype, generator=generator)
        return (2 * draw - 1) * edge
    moved = coords + uniform(2, shift)
    return moved * uniform(2, math.log(stretch)).exp() * uniform(1, math.log(rescale)).exp()


def product(ys: Tensor, xs: Tensor, order: str) -> Tensor:
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([y, x] if order == "yx" else [x, y], -1).flatten(0, 1)


def sinusoid_2d(height: int, width: int, dim: int, *, theta: float = 10000.0) -> Tensor:
    """Return (height * width, dim): half of the channels encode the column, the others the row (MAE, CLIPA). Raises
    InputError unless `dim` is a multiple of 4."""
    if dim % 4:
        raise InputError(f"2-D sinusoids need a width that is a multiple of 4, not {dim}")
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sinusoid(axis.flatten(), dim // 2, theta=theta) for axis in (xs, ys)], -1)


def resample_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, mode: str = "bicubic",
                  antialias: bool = True, align_corners: bool = False) -> Tensor:
    """Interpolate a table of learned 2-D positions (old[0] * old[1], D) -> (new[0] * new[1], D)."""
    if old == new:
        return table
    picture = table.float().T.reshape(1, -1, *old)
    picture = F.interpolate(picture, new, mode=mode, antialias=antialias, align_corners=align_corners)
    return picture.flatten(2)[0].T.to(table.dtype)


def resample_line(table: Tensor, length: int) -> Tensor:
    """Interpolate a table of learned 1-D positions linearly, (L, D) -> (length, D)."""
    if len(table) == length:
        return table
    line = F.interpolate(table.float().T.unsqueeze(0), length, mode="linear", align_corners=False)
    return line[0].T.to(table.dtype)
