"""The vision transformer, as a shape that its spec fills in. Dosovitskiy et al., 2020."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.checkpoint.pretrained import Pretrained
from mm.errors import InputError
from mm.nn.norm import build_norm
from mm.nn.transformer import Transformer
from mm.positions.visibility import At, padded

from .. import spec
from .families import FAMILIES
from .flex import Flex, FlexPreprocess
from .image import Preprocess, Source
from .patches import Patchify, build_positions, coordinates, kept_patches, take
from .pooling import Head


@dataclass(frozen=True)
class Embedded:
    """What the first block reads: tokens (B, N, D), where they are, which are real (B, N) (None: all)."""

    tokens: Tensor
    at: At | None
    real: Tensor | None


class ImageEncoder(Pretrained):
    """A model with files on disk whose `preprocessing` turns pictures into its input."""

    families = FAMILIES

    def preprocess(self, image: Source | Sequence[Source]) -> Tensor | Flex:
        """One picture (PIL image, array, path, bytes) -> (3, h, w); a list of them -> a batch (B, 3, h, w)."""
        if self.preprocessing is None:
            self.preprocessing = Preprocess(size=self.spec.image)
        return self.preprocessing.batch(image) if isinstance(image, list | tuple) else self.preprocessing(image)

    def collate(self, pictures: Sequence[Tensor]) -> Tensor | Flex:
        """Pictures (3, h, w), each as `preprocess` makes it -> one batch."""
        flex = isinstance(self.preprocessing, FlexPreprocess)
        return self.preprocessing.collate(pictures) if flex else torch.stack(list(pictures))


class ViT(ImageEncoder):
    """pixels (B, C, h, w) -> tokens (B, N, D), prefix tokens first, after the final norm where the stack has one.

    `labels` are the names of the classes where the projection is a classifier. A `Flex` batch of pictures of several
    sizes is taken wherever pixels are.
    """

    kind, inside = "vit", {"clip": "image"}  # a CLIP checkpoint gives its image tower

    def __init__(self, settings: spec.ViTSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.prefix = settings.cls + settings.registers
        self.patchify = Patchify(dim, settings.patches)
        self.cls = nn.Parameter(torch.empty(settings.cls, dim)) if settings.cls else None
        self.registers = nn.Parameter(torch.empty(settings.registers, dim)) if settings.registers else None
        grid = settings.patches.grid(*settings.image)
        self.positions = build_positions(settings.positions, dim, grid, self.prefix)
        self.pre_norm = build_norm(settings.pre_norm, dim)
        self.stack = Transformer(settings.stack)
        self.head = Head(dim, settings.head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tokens in (self.cls, self.registers):
            if tokens is not None:
                nn.init.normal_(tokens, std=tokens.shape[1] ** -0.5)

    def forward(self, pixels: Tensor | Flex, features: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """With `features`, maps (B, D, rows, columns) of the residual stream after each of these blocks (negative
        numbers count from the end), before the final norm.

        Raises InputError unless pixels are floating-point (B, C, h, w) with at least one whole patch."""
        x = self.embed(pixels)
        return self.stack(x.tokens, x.at) if features is None else self.maps(pixels, x, features)

    def pool(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """tokens (B, N, D) -> (B, D), before the projection; real (B, N) bool leaves out padding."""
        return self.head.pooled(tokens, self.prefix, real=real)

    def encode(self, pixels: Tensor | Flex) -> Tensor:
        """pixels (B, C, h, w) -> features, or the logits of a classifier: (B, E)."""
        x = self.embed(pixels)
        return self.head.proj(self.pool(self.stack(x.tokens, x.at), x.real))

    def maps(self, pixels: Tensor | Flex, x: Embedded, layers: Sequence[int]) -> list[Tensor]:
        depth = len(self.stack.blocks)
        wrong = next((layer for layer in layers if not -depth <= layer < depth), None)
        if wrong is not None:
            raise InputError(f"features asks for block {wrong} of {depth}")
        if isinstance(pixels, Flex) or (self.training and self.spec.patch_dropout):
            raise InputError("feature maps need pixels (B, C, h, w), all patches kept")
        grid = self.spec.patches.grid(*pixels.shape[-2:])
        outputs = self.stack.features(x.tokens, layers, x.at)
        return [y[:, self.prefix:].transpose(1, 2).unflatten(2, grid) for y in outputs]

    def embed(self, pixels: Tensor | Flex) -> Embedded:
        """What the first block reads. Raises InputError as the call does."""
        self.check(pixels)
        x = self.patchify(pixels)
        flex = isinstance(pixels, Flex)
        grids = pixels.sizes if flex else (self.spec.patches.grid(*pixels.shape[-2:]),)
        x = self.placed(x, grids)
        coords = None if self.spec.coords is None else self.coordinates(x, grids)
        real = prefixed(pixels.real, self.prefix) if flex else None
        if self.training and self.spec.patch_dropout:
            index = kept_patches(*x.shape[:2], self.prefix, self.spec.patch_dropout, x.device)
            x, coords, real = (None if t is None else take(t, index) for t in (x, coords, real))
        return Embedded(self.pre_norm(x), self.where(x, coords, real), real)

    def placed(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Patches (B, N, D) with their positions added, behind the prefix tokens."""
        held = 0
        first = [part for part in (self.cls, self.registers) if part is not None]
        if self.positions is not None:
            tables, held = [self.positions(grid) for grid in grids], self.positions.prefix
            x = x + stacked([table[held:] for table in tables], x.shape[1])
        if first:
            prefix = torch.cat(first) + tables[0][:held] if held else torch.cat(first)
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        return x

    def coordinates(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """(B or 1, prefix + N, 2): what the rope turns by, 0 for prefix tokens and padding."""
        per_grid = [coordinates(grid, self.spec.coords, self.training, x.device) for grid in grids]
        return F.pad(stacked(per_grid, x.shape[1] - self.prefix), (0, 0, self.prefix, 0))

    def where(self, x: Tensor, coords: Tensor | None, real: Tensor | None) -> At | None:
        if real is not None:
            at = padded(real)
            return At(at.position, coords=coords)
        if coords is None:
            return None
        return At(torch.arange(x.shape[1], device=x.device)[None], coords=coords, regular=True)

    def check(self, pixels: Tensor | Flex) -> None:
        patches = self.spec.patches
        if isinstance(pixels, Flex):
            width = patches.size[0] * patches.size[1] * patches.channels
            if pixels.patches.ndim != 3 or pixels.patches.shape[2] != width:
                raise InputError(f"patches should be (B, N, {width}), not of shape {tuple(pixels.patches.shape)}")
            rows, room = pixels.patches.shape[:2]
            if len(pixels.sizes) != rows or max(h * w for h, w in pixels.sizes) > room:
                raise InputError(f"sizes {pixels.sizes} do not fit patches of shape {tuple(pixels.patches.shape)}")
            return
        if pixels.ndim != 4 or pixels.shape[1] != patches.channels:
            raise InputError(f"pixels should be (B, {patches.channels}, h, w), not of shape {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise InputError(f"pixels should be floating-point and normalised, not {pixels.dtype}")
        if tuple(pixels.shape[-2:]) != tuple(self.spec.image):  # SigLIP so400m was trained at 384 with patches of 14
            patches.check(*pixels.shape[-2:])

    def check_files(self, where: str) -> None:
        proj = self.spec.head.proj
        if self.labels and (proj is None or len(self.labels) != proj.dim):
            raise InputError(f"{where} names {len(self.labels)} labels for {proj.dim if proj else 0} classes")


def stacked(tables: Sequence[Tensor], length: int) -> Tensor:
    """One (n, D) per row, n up to `length` -> (B, length, D), filled up with zeros."""
    if all(len(table) == length for table in tables):
        return torch.stack(list(tables))
    return torch.stack([F.pad(table, (0, 0, 0, length - len(table))) for table in tables])


def prefixed(real: Tensor, prefix: int) -> Tensor:
    """real (B, N) with `prefix` tokens before it that are always there."""
    return F.pad(real, (prefix, 0), value=True)
