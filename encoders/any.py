"""A checkpoint of whatever kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mm.errors import InputError

from .vision.families import FAMILIES

if TYPE_CHECKING:
    from .clip import CLIP
    from .vision.vit import ViT


def open_model(name_or_dir: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, *,
               allow_pickle: bool = False) -> CLIP | ViT:
    """The model of a directory or hub name, a CLIP or a ViT by what its files say. Raises InputError."""
    from .clip import CLIP
    from .vision.vit import ViT

    folder = FAMILIES.resolve(name_or_dir)
    kinds = {"clip": CLIP, "vit": ViT}
    kind = FAMILIES.kind_of(folder)
    if kind is None:
        told = " or ".join(FAMILIES.names.values())
        try:
            FAMILIES.recognise(folder, "clip")
        except InputError as error:
            raise InputError(str(error).replace("no CLIP checkpoint", f"no {told} checkpoint")) from None
    return kinds[kind].from_pretrained(folder, dtype, device, allow_pickle=allow_pickle)
