"""Streams that go on frame by frame, on a GPU as two CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm.errors import InputError
from mm.nn.graph import Replay

from .mimi import Mimi


class Stream:
    """`batch` rows of a codec. `state` is that of `Mimi.init_state`: reset it, write to it or save it between calls.

    On a GPU each direction is captured as a CUDA graph by its second call; what a call returns is overwritten by the
    next of its kind, and values are not checked."""

    def __init__(self, model: Mimi, batch: int, *, codebooks: int | None = None):
        s, device = model.spec, model.downsample.weight.device
        self.codebooks = s.quantizer.codebooks if codebooks is None else codebooks
        self.state = model.init_state(batch)
        self.rows = torch.ones(batch, dtype=torch.bool, device=device)
        self.wave = torch.zeros(batch, s.seanet.channels, s.frame, dtype=model.downsample.weight.dtype, device=device)
        self.codes = torch.zeros(batch, self.codebooks, 1, dtype=torch.long, device=device)
        steps = (lambda: model.encode(self.wave, state=self.state, rows=self.rows, codebooks=self.codebooks),
                 lambda: model.decode(self.codes, state=self.state, rows=self.rows))
        self.encoder, self.decoder = (Replay(step) if device.type == "cuda" else step for step in steps)

    def encode(self, wave: Tensor, rows: Tensor | None = None) -> Tensor:
        """wave (B, C, frame), rows (B,) bool that advance (default: all) -> codes (B, Q, 1)."""
        return self.go(self.encoder, self.wave, wave, rows)

    def decode(self, codes: Tensor, rows: Tensor | None = None) -> Tensor:
        """codes (B, Q, 1) of as many codebooks as the stream was made for -> wave (B, C, frame)."""
        return self.go(self.decoder, self.codes, codes, rows)

    @torch.no_grad()
    def go(self, step: Callable[[], Tensor], place: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        for name, x, wanted in (("input", given, place), ("rows", rows, self.rows)):
            if x is not None and (x.shape != wanted.shape or x.is_floating_point() != wanted.is_floating_point()):
                raise InputError(f"this stream takes {wanted.dtype} {tuple(wanted.shape)} as its {name}, not {x.dtype} "
                                 f"{tuple(x.shape)}")
        place.copy_(given)
        self.rows.fill_(True) if rows is None else self.rows.copy_(rows)
        return step()
