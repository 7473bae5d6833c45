"""Waveforms to tokens and back."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "Mimi": "mm.codecs.mimi",
})
