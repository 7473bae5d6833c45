"""A step as one CUDA graph: launched at once, without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
