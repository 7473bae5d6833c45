"""A step as one program: compiled, and on a GPU captured as a CUDA graph, without Python between its kernels."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def compiled(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A step that has no arguments, through torch.compile, and on a GPU as a CUDA graph; as it is, with a warning, on a
    CPU without a C++ compiler."""
    if device.type == "cpu" and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
        warnings.warn("steps are not compiled: that needs a C++ compiler, and g++ was not found", stacklevel=2)
        return step
    return Replay(torch.compile(step, dynamic=False)) if device.type == "cuda" else Compiled(step)


class Compiled:
    """Calls a compiled step. The first call checks all that it was compiled for, the others only what tells it from the
    program of another step: a millisecond less. `renew` begins again, after a tensor that the step reads was replaced.
    """

    def __init__(self, step: Callable[[], Tensor]):
        self.step = torch.compile(step, dynamic=False)
        self.renew()

    def renew(self) -> None:
        self.checked = False

    def __call__(self) -> Tensor:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self.checked):
            self.checked = True
            return self.step()


class Replay:
    """Calls a step that has no arguments, works in place, and whose result keeps its memory.

    The first call is plain, in which libraries and compilers get ready; the second is captured, and it and all others
    are replayed. `renew` begins again, after a tensor that the step reads was replaced."""

    def __init__(self, step: Callable[[], Tensor]):
        self.step = step
        self.renew()

    def renew(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ready = False

    def __call__(self) -> Tensor:
        if not self.ready:
            self.ready = True
            return self.step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.step()
        self.graph.replay()
        return self.out
