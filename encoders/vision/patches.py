"""Pictures as tokens: the patch projection, positions and rotary coordinates on a grid of any size, patch dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn.linear import linear

from .. import spec
from .flex import Flex
from .grid import centred_grid, index_grid, jitter, resample_grid, resample_line, sinusoid_2d

Size = tuple[int, int]


class Patchify(nn.Module):
    """pixels (B, C, h, w), or patches that are cut already -> (B, N, D), row by row."""

    def __init__(self, dim: int, settings: spec.Patches):
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(dim, settings.channels, *settings.size))
        self.bias = nn.Parameter(torch.empty(dim)) if settings.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, pixels: Tensor | Flex) -> Tensor:
        s = self.settings
        if isinstance(pixels, Flex):
            return linear(pixels.patches.to(self.weight.dtype), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        pixels = pixels.to(self.weight.dtype)
        if s.stride not in (None, s.size):
            return F.conv2d(pixels, self.weight, self.bias, s.stride).flatten(2).transpose(1, 2)
        (rows, columns), (ph, pw) = s.grid(*pixels.shape[-2:]), s.size
        whole = pixels[..., : rows * ph, : columns * pw]
        patches = whole.unflatten(3, (columns, pw)).unflatten(2, (rows, ph)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class GridPositions(nn.Module):
    """A table (prefix + N, D) of positions, laid over the grid at hand."""

    def __init__(self, dim: int, grid: Size, prefix: int, settings: spec.GridTable):
        super().__init__()
        self.grid, self.settings = grid, settings
        self.prefix = prefix if settings.prefix else 0
        self.weight = nn.Parameter(torch.empty(self.prefix + grid[0] * grid[1], dim), requires_grad=not settings.fixed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.settings.fixed:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            return
        with torch.no_grad():
            self.weight[: self.prefix] = 0
            self.weight[self.prefix :] = sinusoid_2d(*self.grid, self.weight.shape[1])

    def forward(self, grid: Size) -> Tensor:
        """(prefix + N, D) for this grid."""
        if grid == self.grid:
            return self.weight
        s, (rows, columns) = self.settings, grid
        whole = around(grid) if s.keep_aspect else grid
        table = resample_grid(self.weight[self.prefix :], self.grid, whole, mode=s.mode, antialias=s.antialias,
                              align_corners=s.align_corners)
        if whole != grid:
            table = table.unflatten(0, whole)[:rows, :columns].flatten(0, 1)
        return torch.cat([self.weight[: self.prefix], table])


class FactorPositions(nn.Module):
    """Tables of rows (h, D) and columns (w, D), laid over the grid at hand; prefix tokens have no position."""

    prefix = 0

    def __init__(self, dim: int, grid: Size, settings: spec.FactorTable):
        super().__init__()
        self.settings = settings
        self.rows, self.columns = (nn.Parameter(torch.empty(side, dim)) for side in grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=(2 * table.shape[1]) ** -0.5)

    def forward(self, grid: Size) -> Tensor:
        """(N, D) for this grid."""
        whole = around(grid) if self.settings.keep_aspect else grid
        rows, columns = (resample_line(table, length)[:side] for table, length, side in
                         zip((self.rows, self.columns), whole, grid, strict=True))
        return (rows[:, None] + columns).flatten(0, 1)


def build_positions(settings: spec.GridTable | spec.FactorTable | None, dim: int, grid: Size, prefix: int
                    ) -> GridPositions | FactorPositions | None:
    match settings:
        case spec.GridTable():
            return GridPositions(dim, grid, prefix, settings)
        case spec.FactorTable():
            return FactorPositions(dim, grid, settings)
    return None


def around(grid: Size) -> Size:
    """The square around a grid."""
    return (max(grid),) * 2


def coordinates(grid: Size, settings: spec.IndexGrid | spec.CentredGrid, training: bool, device: torch.device
                ) -> Tensor:
    """(N, 2) rotary coordinates of the patches of a grid, moved at random while training where the settings say so."""
    if isinstance(settings, spec.IndexGrid):
        reference = settings.reference and tuple(settings.reference)
        return index_grid(*grid, order=settings.order, reference=reference, offset=settings.offset, device=device)
    coords = centred_grid(*grid, normalise=settings.normalise, device=device)
    moves = settings.shift or settings.stretch != 1 or settings.rescale != 1
    if not (training and moves):
        return coords
    return jitter(coords, shift=settings.shift, stretch=settings.stretch, rescale=settings.rescale)


def kept_patches(batch: int, length: int, prefix: int, rate: float, device: torch.device) -> Tensor:
    """(B, fewer) indices of the tokens that stay: a random share 1 - rate of each row's patches, and all prefix tokens
    (FLIP, 2022). `length` counts the prefix too."""
    patches = length - prefix
    kept = max(1, int(patches * (1 - rate)))
    chosen = torch.rand(batch, patches, device=device).topk(kept).indices + prefix
    return torch.cat([torch.arange(prefix, device=device).expand(batch, -1), chosen], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B or 1, N, ...) at index (B, M) -> (B, M, ...)."""
    x = x.expand(len(index), *x.shape[1:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
