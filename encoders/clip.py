"""CLIP: an image tower and a text tower that end in one space (Radford et al., 2021), and one for sounds if wanted, in
the manner of ImageBind (Girdhar et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.checkpoint.pretrained import load
from mm.errors import InputError
from mm.nn.transformer import Transformer
from mm.positions.visibility import padded
from mm.tokenizer.tokenizer import Tokenizer

from . import spec
from .audio.spectrogram import Sound
from .vision.backbone import Backbone
from .vision.flex import Flex
from .vision.image import Preprocess, Source
from .vision.pooling import Head
from .vision.vit import ImageEncoder, ViT

open_model = load  # its name in version 0.1
Part = TypeVar("Part")


class TextTower(nn.Module):
    """ids (B, T) -> tokens (B, T, D), after the final norm where the stack has one."""

    def __init__(self, settings: spec.TextSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.tokens = nn.Parameter(torch.empty(settings.vocab, dim))
        self.positions = nn.Parameter(torch.empty(settings.context, dim))
        self.stack = Transformer(settings.stack)
        self.head = Head(dim, settings.head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """Raises InputError unless ids are integers (B, T) with 1 <= T <= context."""
        self.check(ids)
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        real = self.real(ids)
        return self.stack(x, None if real is None else padded(real))

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """tokens (B, T, D), ids (B, T) -> (B, D), before the projection."""
        return self.head.pooled(tokens, ids=ids, real=self.real(ids))

    def encode(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> features (B, E)."""
        return self.head.proj(self.pool(self(ids), ids))

    def real(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool: the tokens that are not padding; None where padding counts."""
        return None if self.spec.pad is None else ids != self.spec.pad

    def check(self, ids: Tensor) -> None:
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.spec.context:
            raise InputError(f"ids should be (B, T), T from 1 to {self.spec.context}, not of shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids should be integers, not {ids.dtype}")


class CLIP(ImageEncoder):
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


def build_image_tower(settings: spec.ViTSpec | spec.Backbone) -> ViT | Backbone:
    """A ViT, or the model of timm that the spec names."""
    return Backbone(settings) if isinstance(settings, spec.Backbone) else ViT(settings)
