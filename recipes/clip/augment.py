"""Random changes of a whole batch of pictures at once, on the device where it lies, from a generator of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import Augment, Colour, Geometry, Texture


class Dice:
    """Random numbers for the rows of this process, drawn for the whole batch so that they do not depend on how many
    processes share it. `noise` alone is drawn for these rows only, on their device."""

    def __init__(self, seed: int, rows: int, *, rank: int = 0, world: int = 1,
                 device: torch.device | str = "cpu") -> None:
        self.draws = torch.Generator().manual_seed(seed)
        self.noises = torch.Generator(device).manual_seed(seed + rank)
        self.total, self.mine, self.device = rows * world, slice(rank * rows, (rank + 1) * rows), device

    def _own(self, draw: Tensor, *shape: int) -> Tensor:
        draw = draw[self.mine].to(self.device, non_blocking=True)
        return draw.view(-1, *shape)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape), uniform between low and high."""
        draw = torch.rand(self.total, math.prod(shape), generator=self.draws)
        return self._own(low + (high - low) * draw, *shape)

    def normal(self, std: float, *shape: int) -> Tensor:
        return self._own(std * torch.randn(self.total, math.prod(shape), generator=self.draws), *shape)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """(B, *shape) of bool."""
        return self.uniform(0, 1, *shape) < probability

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.noises, device=like.device)


def augment(pixels: Tensor, size: tuple[int, int], settings: Augment, dice: Dice) -> Tensor:
    """pixels (B, 3, h, w) in [0, 1] -> (B, 3, *size) in [0, 1]."""
    pixels = move(pixels, size, settings.geometry, dice, settings.white)
    pixels = texture(pixels, settings.texture, dice)
    return cutout(recolour(pixels, settings.colour, dice), settings.texture.cutout, dice)


def move(pixels: Tensor, size: tuple[int, int], g: Geometry, dice: Dice, white: bool) -> Tensor:
    if not any((g.rotation, g.scale, g.aspect, g.shear, g.shift, g.warp)):
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return torch.where(dice.chance(g.flip, 1, 1, 1), pixels.flip(-1), pixels)
    grid = F.affine_grid(_affine(g, dice), [len(pixels), 3, *size], align_corners=False)
    if g.warp:
        down, across = (smooth(n).to(pixels.device) for n in size)
        grid = grid + (down @ dice.normal(g.warp, 2, 4, 4) @ across.T).permute(0, 2, 3, 1)
    if white:
        return 1 - F.grid_sample(1 - pixels, grid, padding_mode="zeros", align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


@lru_cache
def smooth(size: int) -> Tensor:
    """(size, 4): the weights of four values in a cubic curve of `size` points."""
    one = torch.eye(4)[None, :, :, None]
    return F.interpolate(one, (size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


def _affine(g: Geometry, dice: Dice) -> Tensor:
    """(B, 2, 3): where each output place looks in the input."""
    angle = dice.uniform(-g.rotation, g.rotation).deg2rad()
    skew = dice.uniform(-g.shear, g.shear).deg2rad().tan()
    scale, aspect = dice.uniform(-g.scale, g.scale).exp(), dice.uniform(-g.aspect, g.aspect).exp()
    mirror = 1 - 2 * dice.chance(g.flip).float()
    shift = dice.uniform(-g.shift, g.shift, 2)
    across = torch.stack([scale * aspect * mirror * angle.cos(), scale * (skew - angle.sin()), shift[:, 0]], dim=1)
    down = torch.stack([scale * mirror * angle.sin(), scale / aspect * angle.cos(), shift[:, 1]], dim=1)
    return torch.stack([across, down], dim=1)


def recolour(pixels: Tensor, c: Colour, dice: Dice) -> Tensor:
    """Every colour change is affine in (r, g, b), so all of them are one matrix product a picture."""
    matrix = _hue_and_saturation(c, dice) * dice.uniform(-c.gain, c.gain, 3, 1).exp()
    matrix = matrix * dice.uniform(-c.contrast, c.contrast, 1, 1).exp()
    if c.permute:
        order = dice.uniform(0, 1, 3).argsort(dim=1)
        order = torch.where(dice.chance(c.permute, 1), order, torch.arange(3, device=order.device))
        matrix = matrix.gather(1, order[:, :, None].expand(-1, 3, 3))
    sign = 1 - 2 * dice.chance(c.invert, 1, 1).float()
    offset = 0.5 + sign * dice.uniform(-c.brightness, c.brightness, 1, 1)
    flat = pixels.flatten(2) - 0.5
    return torch.baddbmm(offset.expand(-1, 3, 1), sign * matrix, flat).clamp_(0, 1).view_as(pixels)


def _hue_and_saturation(c: Colour, dice: Dice) -> Tensor:
    """(B, 3, 3): a turn about the axis of grays, and a stretch away from it."""
    angle = dice.normal(c.hue, 1, 1)
    stretch = dice.uniform(-c.saturation, c.saturation, 1, 1).exp() * ~dice.chance(c.gray, 1, 1)
    gray = torch.full((3, 3), 1 / 3, device=angle.device)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    return gray + stretch * (angle.cos() * (torch.eye(3, device=angle.device) - gray) + angle.sin() * turn)


def texture(pixels: Tensor, t: Texture, dice: Dice) -> Tensor:
    if t.background:
        chosen = dice.chance(t.background, 1, 1, 1)
        colour = torch.where(chosen, dice.uniform(0, 1, 3, 1, 1), 1.0)
        pixels = torch.where(pixels.amin(dim=1, keepdim=True) > 0.97, colour, pixels)
    if t.blur:
        pixels = torch.where(dice.chance(t.blur, 1, 1, 1), around(pixels, torch.add) / 9, pixels)
    if t.outline:
        edges = (around(pixels, torch.maximum) - pixels).amax(dim=1, keepdim=True)
        strength = dice.uniform(0, 1.5, 1, 1, 1) * dice.chance(t.outline, 1, 1, 1)
        pixels = (pixels - strength * edges).clamp_(0, 1)
    if t.noise:
        pixels = (pixels + t.noise * dice.noise(pixels)).clamp_(0, 1)
    return pixels


def around(pixels: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The 3 x 3 neighbourhood of every pixel joined into one value, rows first; far faster than pooling on a CPU."""
    p = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    p = join(join(p[..., :-2], p[..., 1:-1]), p[..., 2:])
    return join(join(p[..., :-2, :], p[..., 1:-1, :]), p[..., 2:, :])


def cutout(pixels: Tensor, probability: float, dice: Dice) -> Tensor:
    """Hides a box of up to half the side behind one colour."""
    if not probability:
        return pixels
    height, width = pixels.shape[-2:]
    centre, reach = dice.uniform(0, 1, 2, 1), dice.uniform(0, 0.25, 2, 1) * dice.chance(probability, 1, 1)
    rows, columns = ((torch.arange(n, device=pixels.device) + 0.5) / n for n in (height, width))
    inside_rows = (rows - centre[:, 0]).abs() < reach[:, 0]
    inside_columns = (columns - centre[:, 1]).abs() < reach[:, 1]
    box = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return torch.where(box, dice.uniform(0, 1, 3, 1, 1), pixels)
