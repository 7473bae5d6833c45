"""Sounds to tokens and back."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    **dict.fromkeys(("Mimi", "Stream"), "mm.codecs.mimi"),
    "Framer": "mm.codecs.state",
    "open_sound": "mm.codecs.sound"})
