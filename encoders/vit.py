"""The vision transformer, as a shape that its spec fills in. Dosovitskiy et al., 2020."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.norm import build_norm
from mm.transformer import Transformer

from . import spec
from .patches import GridPositions, Patchify, drop_patches
from .pooling import Head


class ViT(nn.Module):
    """pixels (B, C, h, w) -> tokens (B, N, D), prefix tokens first, after the final norm where the stack has one."""

    def __init__(self, settings: spec.ViTSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.prefix = settings.cls + settings.registers
        self.patchify = Patchify(dim, settings.patches)
        self.cls = nn.Parameter(torch.empty(settings.cls, dim)) if settings.cls else None
        self.registers = nn.Parameter(torch.empty(settings.registers, dim)) if settings.registers else None
        table = settings.positions
        grid = settings.patches.grid(*settings.image)
        self.positions = GridPositions(dim, grid, self.prefix, table) if table else None
        self.pre_norm = build_norm(settings.pre_norm, dim)
        self.stack = Transformer(settings.stack)
        self.head = Head(dim, settings.head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tokens in (self.cls, self.registers):
            if tokens is not None:
                nn.init.normal_(tokens, std=tokens.shape[1] ** -0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises InputError unless pixels are floating-point (B, C, h, w) with at least one whole patch."""
        return self.stack(self.embed(pixels))

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) -> (B, D), before the projection."""
        return self.head.pooled(tokens, self.prefix)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, C, h, w) -> features (B, E)."""
        return self.head.proj(self.pool(self(pixels)))

    def embed(self, pixels: Tensor) -> Tensor:
        """What the first block reads: (B, N, D)."""
        check_pixels(pixels, self.spec.patches)
        x = self.patchify(pixels.to(self.patchify.weight.dtype))
        own = [part for part in (self.cls, self.registers) if part is not None]
        held = 0
        if self.positions is not None:
            table, held = self.positions(self.spec.patches.grid(*pixels.shape[-2:])), self.positions.prefix
            x = x + table[held:]
        if own:
            first = torch.cat(own) + table[:held] if held else torch.cat(own)
            x = torch.cat([first.expand(x.shape[0], -1, -1), x], 1)
        if self.training and self.spec.patch_dropout:
            x = drop_patches(x, self.prefix, self.spec.patch_dropout)
        return self.pre_norm(x)


def check_pixels(pixels: Tensor, patches: spec.Patches) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != patches.channels:
        raise InputError(f"pixels should be (B, {patches.channels}, h, w), not of shape {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise InputError(f"pixels should be floating-point and normalised, not {pixels.dtype}")
    patches.grid(*pixels.shape[-2:])
