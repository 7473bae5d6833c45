"""CLIP: an image tower and a text tower that end in one space. Radford et al., 2021."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import checkpoint
from mm.errors import InputError
from mm.schema import fingerprint
from mm.tokenizer import Tokenizer, load_tokenizer

from . import families, spec
from .image import Preprocess, Source
from .text import TextEncoder
from .vit import ViT


class CLIP(nn.Module):
    """pixels (B, 3, h, w), ids (B, T) -> image features (B, E), text features (B, E), before normalisation.

    `logit_scale` () is the logarithm of the factor on cosines; `logit_bias` () is SigLIP's offset or None.
    """

    def __init__(self, settings: spec.CLIPSpec, *, preprocess: Preprocess | None = None,
                 tokenizer: Tokenizer | None = None):
        super().__init__()
        self.spec = settings
        self.image, self.text = ViT(settings.image), TextEncoder(settings.text)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if settings.logit_bias is None else nn.Parameter(torch.empty(()))
        self.preprocessing = preprocess or Preprocess(size=settings.image.image)
        self.tokenizer = tokenizer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, self.spec.logit_scale)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.spec.logit_bias)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(pixels), self.encode_text(ids)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, h, w) of any size -> (B, E)."""
        return self.image.encode(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, T), T up to the context -> (B, E)."""
        return self.text.encode(ids)

    # ----------------------------------------------------------------------------- pictures and words
    def preprocess(self, image: Source | Sequence[Source]) -> Tensor:
        """A picture (PIL, array, path, bytes) -> (3, h, w); several -> (B, 3, h, w)."""
        return self.preprocessing.batch(image) if isinstance(image, list | tuple) else self.preprocessing(image)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> ids (B, context), longer ones cut. Raises InputError when the checkpoint had no tokenizer."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: its directory held none, give CLIP one as tokenizer=")
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts), self.spec.text.context)

    @torch.no_grad()
    def similarity(self, images: Source | Sequence[Source] | Tensor, texts: str | Sequence[str]) -> Tensor:
        """Cosines (images, texts) of pictures, or of preprocessed pixels (B, 3, h, w), with texts."""
        pixels = images if isinstance(images, Tensor) else self.preprocess(
            list(images) if isinstance(images, list | tuple) else [images])
        device = self.logit_scale.device
        image, text = self(pixels.to(device), self.tokenize(texts).to(device))
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

    # ------------------------------------------------------------------------------------- on disk
    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, *, allow_pickle: bool = False) -> Self:
        """A model in evaluation mode from a directory or a hub name, in any of the layouts mm, hf and open_clip.

        `dtype` None keeps that of the file. `allow_pickle` reads torch files that hold more than tensors. Raises
        InputError for a config that is not understood and for weights that contradict it.
        """
        folder = checkpoint.resolve(name_or_dir, families.WEIGHT_PATTERNS)
        family = families.recognise(folder)
        path = folder / family.config
        settings = family.to_spec(checkpoint.read_json(path), str(path))
        weights = checkpoint.open_weights(folder, family.weights, allow_pickle=allow_pickle)
        table = family.table(settings, weights.shapes)
        model = checkpoint.load(lambda: cls(settings), weights, table, dtype=dtype, device=device)
        model.preprocessing = Preprocess.from_files(folder, settings.image.image)
        model.tokenizer = load_tokenizer(folder)
        model.check_files(str(folder))
        return model.eval()

    def check_files(self, where: str) -> None:
        """Whether the tokenizer's ids fit the embedding and the pictures fit the tower; raises InputError."""
        vocab = self.spec.text.vocab
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab:
            raise InputError(f"{where}: the tokenizer has {self.tokenizer.vocab_size} entries, the embedding {vocab}")

    def save_pretrained(self, folder: str | Path, layout: str = "mm") -> None:
        """Write weights, tokenizer, preprocessing and, last, the config: layout mm, hf (transformers) or open_clip.
        Raises InputError when the layout cannot hold this model."""
        family, folder = families.by_layout(layout), Path(folder)
        files = family.files(family.from_spec(self.spec), self.preprocessing, self.tokenizer)
        state = family.table(self.spec, ()).save(self.state_dict(), layout)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder, state, family.weights[0])
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        for name, content in files.items():
            checkpoint.write_json(folder / name, content)

    def fingerprint(self) -> str:
        """Sixteen hex digits of the spec, the preprocessing and every weight: the same after saving and loading."""
        digest = hashlib.sha256(f"{fingerprint(self.spec)} {fingerprint(self.preprocessing)}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]
