"""A CLIP or a ViT, whichever a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mm.checkpoint.pretrained import load

if TYPE_CHECKING:
    from .clip import CLIP
    from .vision.vit import ViT


def open_model(name_or_dir: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, *,
               allow_pickle: bool = False) -> CLIP | ViT:
    """The model of a directory, a hub name or the name of a shipped model. Raises InputError."""
    return load(name_or_dir, dtype, device, allow_pickle=allow_pickle, kinds=("clip", "vit"))
