"""Attention: `attend`, its paths (Triton kernels, PyTorch's SDPA, tiles in plain torch), and the checks of a call."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "attend": "mm.kernels.dispatch", "explain": "mm.kernels.dispatch",
    "Bias": "mm.kernels.options", "debug": "mm.kernels.options"})
