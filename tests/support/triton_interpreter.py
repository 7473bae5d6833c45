"""Triton's interpreter, mended for tests."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bfloat16_as_in_hardware(monkeypatch):
    """The interpreter multiplies the bit patterns of bfloat16, and cuts where hardware rounds."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.create_fp_trunc

    def wide(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 \
            else x

    def rounded(self, x, dtype):
        if dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        bits = x.data.view(np.uint32)
        return handle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))
    monkeypatch.setattr(builder, "create_fp_trunc", rounded)
