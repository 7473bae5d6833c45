"""Pixels, words and spectrograms to vectors."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "CLIP": "mm.encoders.clip",
    "TextEncoder": "mm.encoders.text",
    "ViT": "mm.encoders.vit",
    "open_model": "mm.encoders.any",
})
