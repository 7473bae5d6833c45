"""Pictures and texts to unit vectors with a CLIP checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...encoders.clip import CLIP

MODEL = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"  # where the user names none


class Embedder:
    """A model, its name, and the fingerprint of its weights."""

    def __init__(self, clip: CLIP, name: str) -> None:
        self.clip, self.name, self.fingerprint = clip, name, clip.fingerprint()

    @classmethod
    def load(cls, name: str | Path, device: str | None = None) -> Embedder:
        """A checkpoint by hub name or directory in float32, on the GPU if there is one. Raises InputError."""
        import torch

        from ...encoders.clip import CLIP

        name = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else str(name)
        return cls(CLIP.from_pretrained(name, torch.float32, choose_device(device)), name)

    @property
    def dim(self) -> int:
        return self.clip.spec.dim

    def images(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """Preprocessed pictures, each (3, h, w) -> unit vectors (B, E) float32, NaN where the model fails."""
        import torch

        with torch.inference_mode():
            return self._unit(self.clip.encode_image(self.clip.collate(pixels).to(self.clip.logit_scale.device)))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors (B, E) float32."""
        import torch

        with torch.inference_mode():
            return self._unit(self.clip.encode_text(self.clip.tokenize(list(texts)).to(self.clip.logit_scale.device)))

    @staticmethod
    def _unit(features: Tensor) -> np.ndarray:
        features = features.float().cpu()
        return (features / features.norm(dim=-1, keepdim=True)).numpy()


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one. Raises InputError for one that this machine lacks."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine or this torch has no such device") from None
