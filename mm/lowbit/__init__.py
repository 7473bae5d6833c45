"""Weights for inference in fewer bits, or in the order in which a CPU decodes fastest."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict.fromkeys(("arrange", "arrange_for_rows", "quantize"),
                                                             "mm.lowbit.formats"))
