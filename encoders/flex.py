"""Pictures at their own aspect and size (NaFlex): a batch of patches, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.errors import InputError
from mm.tree import register

from .spec import Patches


@dataclass(frozen=True)
class Flex:
    """Pictures of several sizes as one batch. patches: (B, N, ph * pw * C), each patch row by row with its channels
    last, padded at the end. sizes: B pairs (rows, columns) of patches: plain numbers, so that shapes are known."""

    patches: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def real(self) -> Tensor:
        """(B, N) bool: the patches that are not padding."""
        counts = torch.tensor([h * w for h, w in self.sizes], device=self.patches.device)
        return torch.arange(self.patches.shape[1], device=self.patches.device) < counts[:, None]

    def to(self, *args: object, **kwargs: object) -> Flex:
        return Flex(self.patches.to(*args, **kwargs), self.sizes)


register(Flex, meta=("sizes",))


def flex_batch(pictures: Sequence[Tensor], patches: Patches, length: int | None = None) -> Flex:
    """Normalised pictures, each (C, h, w) with sides that are multiples of the patch -> one batch of patches, padded
    with zeros to `length` (None: the longest). Raises InputError that names the picture that does not fit."""
    ph, pw = patches.size
    rows, sizes = [], []
    for i, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[0] != patches.channels:
            raise InputError(f"picture {i} should be ({patches.channels}, h, w), not of shape {tuple(picture.shape)}")
        height, width = picture.shape[1:]
        if not height or not width or height % ph or width % pw:
            raise InputError(f"picture {i} of {height} x {width} pixels is not a whole number of {ph} x {pw} patches")
        cut = picture.unflatten(2, (-1, pw)).unflatten(1, (-1, ph)).permute(1, 3, 2, 4, 0)
        rows.append(cut.flatten(2).flatten(0, 1))
        sizes.append((height // ph, width // pw))
    if not rows:
        raise InputError("a batch needs at least one picture")
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise InputError(f"a picture has {longest} patches, and the batch has room for {length}")
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row, own in zip(padded, rows, strict=True):
        row[: len(own)] = own
    return Flex(padded, tuple(sizes))
