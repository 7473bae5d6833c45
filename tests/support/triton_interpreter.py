"""Triton's interpreter, mended for tests: importing this file leaves a third of its time."""

from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_language_once():
    """The interpreter replaces the functions of `triton.language` anew in every call of a helper, which takes half of
    its time. Once for each helper is enough: a launch replaces those that it restores at its end."""
    patched, call = set(), interpreter.InterpretedFunction.__call__

    def call_patched(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call_patched


def leave_out_what_is_thrown_away():
    """Every sum of integers is also computed in 64 bits and compared, for an assertion that only a debug run makes."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


patch_language_once()
leave_out_what_is_thrown_away()


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
