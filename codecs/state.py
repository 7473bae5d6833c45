"""The stream of a codec: what convolutions and transformers of both directions hold, as one tree of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
