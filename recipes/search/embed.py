"""What an index holds, as unit vectors: pictures and texts by a CLIP, passages of texts by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.errors import InputError

from ..common.options import choose_device
from .pictures import decode
from .pictures import walk as walk_pictures
from .texts import LONGEST, passages
from .texts import walk as walk_texts

if TYPE_CHECKING:
    from torch import Tensor

    from mm.text.encoder import TextEncoder

    from ...encoders.clip import CLIP

MODEL = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"  # where the user names none


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one vector is of: `content` for the model, `about` for the columns of its row."""

    content: Any
    about: dict[str, Any] = field(default_factory=dict)


class Embedder:
    """A CLIP, its name, and the fingerprint of its weights. An index of its vectors holds pictures."""

    holds = "pictures"
    walk = staticmethod(walk_pictures)

    def __init__(self, clip: CLIP, name: str) -> None:
        self.clip, self.name, self.fingerprint = clip, name, clip.fingerprint()

    @classmethod
    def load(cls, name: str | Path, device: str | None = None) -> Embedder:
        """A checkpoint by hub name or directory in float32, on the GPU if there is one. Raises InputError."""
        return cls(opened(name, device, "clip"), full_name(name))

    @property
    def dim(self) -> int:
        return self.clip.spec.dim

    def pieces(self, data: bytes, name: str) -> list[Piece]:
        """The one picture (3, h, w) of a file. Raises InputError that begins with its name."""
        image = decode(data, name)
        width, height = image.size
        return [Piece(content=self.clip.preprocess(image), about={"width": width, "height": height})]

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Unit vectors (N, E) float32, NaN where the model fails."""
        return self.images([piece.content for piece in pieces])

    def images(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """Preprocessed pictures, each (3, h, w) -> unit vectors (B, E) float32, NaN where the model fails."""
        import torch

        with torch.inference_mode():
            return unit(self.clip.encode_image(self.clip.collate(pixels).to(self.clip.logit_scale.device)))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors (B, E) float32."""
        import torch

        with torch.inference_mode():
            return unit(self.clip.encode_text(self.clip.tokenize(list(texts)).to(self.clip.logit_scale.device)))


class SentenceEmbedder:
    """A sentence encoder, its name, and the fingerprint of its weights. An index of its vectors holds texts."""

    holds = "texts"
    walk = staticmethod(walk_texts)

    def __init__(self, encoder: TextEncoder, name: str) -> None:
        if encoder.pooling is None or encoder.tokenizer is None:
            raise InputError(f"{name} makes no sentence vectors: it lacks a pooling (modules.json) or a tokenizer")
        self.encoder, self.name, self.fingerprint = encoder, name, encoder.fingerprint()
        self.longest = min(LONGEST, encoder.room)

    @classmethod
    def load(cls, name: str | Path, device: str | None = None) -> SentenceEmbedder:
        """As `Embedder.load`."""
        return cls(opened(name, device, "encoder"), full_name(name))

    @property
    def dim(self) -> int:
        return self.encoder.dim

    def pieces(self, data: bytes, name: str) -> list[Piece]:
        """The passages of a file. Raises InputError that begins with its name."""
        found = passages(data, name, lambda text: len(self.encoder.tokenizer.encode(text)), self.longest)
        return [Piece(content=one.text, about={"caption": one.text, "line": one.line, "part": i})
                for i, one in enumerate(found)]

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Unit vectors (N, E) float32, NaN where the model fails."""
        return self.texts([piece.content for piece in pieces])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors (B, E) float32."""
        return unit(self.encoder.encode(texts))


def load_embedder(name: str | Path, device: str | None = None) -> Embedder | SentenceEmbedder:
    """What makes vectors with the model behind a name. Raises InputError."""
    model = opened(name, device, "encoder", "clip")
    return (Embedder if model.kind == "clip" else SentenceEmbedder)(model, full_name(name))


def opened(name: str | Path, device: str | None, *kinds: str) -> Any:
    """A model of one of these kinds in float32, on the GPU if there is one. Raises InputError."""
    import torch

    from mm.checkpoint.pretrained import load

    return load(full_name(name), torch.float32, choose_device(device), kinds=kinds)


def full_name(name: str | Path) -> str:
    """A directory's absolute path; a hub name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name)


def unit(features: Tensor) -> np.ndarray:
    features = features.float().cpu()
    return (features / features.norm(dim=-1, keepdim=True)).numpy()
