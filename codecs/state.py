"""The stream of a codec: what convolutions and transformers of both directions hold, as one tree of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError
from mm.nn.state import StackState, State
from mm.tree import register

from .conv import Debt, Past


@dataclass
class Half:
    """One direction: the SEANet's layers, the transformer, the convolution between steps and frames."""

    convs: list[Past | Debt]
    stack: StackState
    resample: Past | Debt

    def reset(self, rows: Tensor | None) -> None:
        self.stack.reset(rows)
        every = torch.ones_like(self.stack.offset, dtype=torch.bool) if rows is None else rows
        for layer in (*self.convs, self.resample):
            held = layer.held if isinstance(layer, Past) else layer.carry
            held.masked_fill_(every[:, None, None], 0)
            if isinstance(layer, Past):
                layer.fresh.logical_or_(every)


register(Half)


@dataclass
class MimiState(State):
    """Made by `Mimi.init_state`. chunk: frames that go through at once; longer inputs are split."""

    encoder: Half
    decoder: Half
    fingerprint: str
    chunk: int

    @property
    def offset(self) -> Tensor:
        """(B,) steps of the encoder's transformer so far."""
        return self.encoder.stack.offset

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, or the rows (B,) bool."""
        self.encoder.reset(rows)
        self.decoder.reset(rows)


register(MimiState, meta=("fingerprint", "chunk"))


@dataclass
class Framer(State):
    """What is left of a stream between calls, and short of a frame: waiting (B, C, frame), of which the first `count`
    samples are there. All rows are fed alike: streams that are not have a framer each."""

    waiting: Tensor
    count: Tensor  # (B,), equal numbers
    fingerprint: str = "framer"

    @classmethod
    def empty(cls, batch: int, channels: int, frame: int) -> Framer:
        """frame: samples."""
        return cls(torch.zeros(batch, channels, frame), torch.zeros(batch, dtype=torch.long))

    def push(self, wave: Tensor) -> Tensor:
        """wave (B, C, L), L from 0 on -> (B, C, n * frame), the frames that are now whole. Raises InputError on another
        batch or number of channels."""
        batch, channels, frame = self.waiting.shape
        if wave.ndim != 3 or tuple(wave.shape[:2]) != (batch, channels):
            raise InputError(f"expected samples ({batch}, {channels}, L), not {tuple(wave.shape)}")
        held = int(self.count[0])
        whole = torch.cat([self.waiting[..., :held].to(wave), wave], 2)
        cut = whole.shape[2] // frame * frame
        rest = whole[..., cut:]
        self.waiting[..., : rest.shape[2]] = rest
        self.count.fill_(rest.shape[2])
        return whole[..., :cut]

    def flush(self) -> Tensor:
        """The last frame, filled with zeros, or (B, C, 0) when nothing waits."""
        held = int(self.count[0])
        self.count.zero_()
        frame = self.waiting.shape[2]
        return F.pad(self.waiting[..., :held], (0, frame - held if held else 0))


register(Framer, meta=("fingerprint",))
