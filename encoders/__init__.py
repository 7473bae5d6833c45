"""Pixels, words and spectrograms to vectors."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "CLIP": "mm.encoders.clip",
    "Hubert": "mm.encoders.audio.hubert",
    "TextTower": "mm.encoders.text",
    "ViT": "mm.encoders.vision.vit",
    "Whisper": "mm.encoders.audio.whisper",
    "open_model": "mm.encoders.any",
})
