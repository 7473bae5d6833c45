"""CLIP: an image tower and a text tower that end in one space (Radford et al., 2021), and one for sounds if wanted, in
the manner of ImageBind (Girdhar et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from . import spec
from .audio.spectrogram import Sound
from .text import TextTower
from .vision.backbone import build_image_tower
from .vision.flex import Flex
from .vision.image import Preprocess, Source
from .vision.pretrained import Pretrained
from .vision.vit import ViT

Part = TypeVar("Part")


class CLIP(Pretrained):
    """pixels (B, 3, h, w), ids (B, T) -> image features (B, E), text features (B, E), before normalisation.

    `logit_scale` () is the logarithm of the factor on cosines; `logit_bias` () is SigLIP's offset or None.
    """

    kind = "clip"

    def __init__(self, settings: spec.CLIPSpec, *, preprocess: Preprocess | None = None,
                 tokenizer: Tokenizer | None = None):
        super().__init__()
        self.spec = settings
        self.image, self.text = build_image_tower(settings.image), TextTower(settings.text)
        self.audio = ViT(settings.audio.tower) if settings.audio else None
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

    def encode_image(self, pixels: Tensor | Flex) -> Tensor:
        """pixels (B, 3, h, w) of any size, or a batch of pictures at their own aspects -> (B, E)."""
        return self.image.encode(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (B, T), T up to the context -> (B, E)."""
        return self.text.encode(ids)

    def encode_audio(self, sounds: Tensor) -> Tensor:
        """Spectrograms (B, 1, F, T) -> (B, E). Raises InputError when the model has no audio tower."""
        return self.hearing(self.audio).encode(sounds)

    @staticmethod
    def hearing(part: Part | None) -> Part:
        if part is None:
            raise InputError("this model has no audio tower: it cannot encode sounds")
        return part

    # ----------------------------------------------------------------------------- pictures and words
    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> ids (B, context), longer ones cut. Raises InputError when the checkpoint had no tokenizer."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: its directory held none, give CLIP one as tokenizer=")
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts), self.spec.text.context)

    def spectrograms(self, sounds: Sound | Sequence[Sound]) -> Tensor:
        """Sounds (files, or samples at the rate of the spectrogram) -> (B, 1, F, T). Raises InputError."""
        sounds = sounds if isinstance(sounds, list | tuple) else [sounds]
        return self.hearing(self.spec.audio).spectrogram.batch(sounds)

    @torch.no_grad()
    def similarity(self, images: Source | Sequence[Source] | Tensor | Flex, texts: str | Sequence[str]) -> Tensor:
        """Cosines (images, texts) of pictures, or of what `preprocess` made of them, with texts."""
        pixels = images if isinstance(images, Tensor | Flex) else self.preprocess(
            list(images) if isinstance(images, list | tuple) else [images])
        device = self.logit_scale.device
        image, text = self(pixels.to(device), self.tokenize(texts).to(device))
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

    def check_files(self, where: str) -> None:
        """Whether the tokenizer's ids fit the embedding and the pictures fit the tower; raises InputError."""
        vocab = self.spec.text.vocab
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab:
            raise InputError(f"{where}: the tokenizer has {self.tokenizer.vocab_size} entries, the embedding {vocab}")
