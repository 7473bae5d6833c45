"""The duplex model: it hears and speaks at once, as streams of codes, and writes what it says as text.

Moshi, Défossez et al., 2024. A temporal stack reads one frame of all streams a step; from what it makes of it come the
next token of text and, one after the other by a depth transformer, the next codes of the model's own voice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mm import spec
from mm.conditions import Conditioned, Conditions, Value
from mm.depth import DepthDecoder
from mm.errors import InputError
from mm.families.duplex import FAMILIES
from mm.linear import Linear
from mm.memory import Memory
from mm.pretrained import Pretrained
from mm.state import StackState
from mm.streams import NONE, CodeTables, TextTable, aligned, delayed
from mm.transformer import Transformer
from mm.visibility import At, packed


class Logits(NamedTuple):
    """text (B, T, V), audio (B, own, T, card): of each frame's own tokens, NaN where a frame ends before its delay."""

    text: Tensor
    audio: Tensor


class Frames(NamedTuple):
    """Streams by step, (B, 1 + Q, T): `inputs` are what the temporal stack reads, `targets` what it is to write in the
    same step, and `known` (bool) says where that is a token of the sequence. Step s holds, of a stream with delay d,
    frame s - d as its target and frame s - d - 1 as its input."""

    inputs: Tensor
    targets: Tensor
    known: Tensor


class DuplexLM(Pretrained):
    """codes (B, 1 + Q, T), text first, then the model's own codebooks, then those it hears -> `Logits`, aligned with
    the codes."""

    kind, families = "duplex", FAMILIES

    def __init__(self, settings: spec.DuplexSpec):
        super().__init__()
        s, dim = settings, settings.stack.dim
        self.spec = s
        self.text, self.codes = TextTable(s.text, dim), CodeTables(s.codebooks, s.card + 1, dim)
        self.stack = Transformer(s.stack)
        self.head = Linear(dim, s.text.outputs or s.text.vocab, bias=s.head_bias)
        self.extra = nn.ModuleList(Linear(dim, size, bias=False) for size in s.extra)
        self.depth = DepthDecoder(s) if s.depth else None
        self.conditions = Conditions(s.conditioning, dim) if s.conditioning else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections of the heads begin with a std of D^-0.5, as the rest by its own rules."""
        for part in (self.head, *self.extra):
            nn.init.normal_(part.weight, std=part.weight.shape[1] ** -0.5)

    @property
    def initial(self) -> tuple[int, ...]:
        """What stands before the first token of each stream."""
        return (self.spec.text.vocab, *[self.spec.card] * self.spec.codebooks)

    def condition(self, values: Mapping[str, Value] | None = None, batch: int = 1) -> Conditioned:
        """Values by name, one a row, as `forward` and `init_state` take them. Raises InputError."""
        if self.conditions is None:
            if values:
                raise InputError(f"this model knows no conditions, not {next(iter(values))!r}")
            return Conditioned()
        return self.conditions(values or {}, batch)

    def frames(self, codes: Tensor, documents: Tensor | None = None) -> Frames:
        """What is read and what is to be written, step by step; documents (B, T): ids of packed conversations, -1 for
        padding."""
        later = tuple(delay + 1 for delay in self.spec.delays)
        inputs, _ = delayed(codes, later, self.initial, documents)
        targets, known = delayed(codes, self.spec.delays, self.initial, documents)
        if documents is not None:
            known = known & (documents >= 0).unsqueeze(1)
        return Frames(inputs, targets, known & (targets != NONE))

    def forward(self, codes: Tensor, conditions: Conditioned | None = None, *,
                documents: Tensor | None = None) -> Logits:
        """Logits of every frame from those before it. Raises InputError on wrong shapes; values are not read."""
        self.check(codes, documents)
        frames = self.frames(codes, documents)
        hidden = self.hidden(frames.inputs, conditions, documents=documents)
        text, there = aligned(self.head(hidden).unsqueeze(0), self.spec.delays[:1], documents)
        text = text if there is None else text.masked_fill(~there.transpose(0, 1).unsqueeze(-1), torch.nan)
        if self.depth is None:
            return Logits(text[0], text.new_zeros(len(codes), 0, codes.shape[2], self.spec.card))
        own = self.spec.own
        deep, there = aligned(self.depth.hidden(hidden, frames.targets[:, :1 + own]), self.spec.delays[1:1 + own],
                              documents)
        audio = self.depth.logits(deep).transpose(0, 1)
        return Logits(text[0], audio if there is None else audio.masked_fill(~there.unsqueeze(-1), torch.nan))

    def embed(self, inputs: Tensor) -> Tensor:
        """inputs (B, 1 + Q, T) -> (B, T, D)."""
        text, end = inputs[:, 0], self.spec.text.end
        text = text if end is None else text.masked_fill(text == end, self.spec.text.padding)
        return self.codes(inputs[:, 1:]) + self.text(text)

    def hidden(self, inputs: Tensor, conditions: Conditioned | None = None, *, documents: Tensor | None = None,
               state: StackState | None = None, rows: Tensor | None = None,
               memory: Tensor | Memory | None = None) -> Tensor:
        """Streams as they are read, (B, 1 + Q, T) -> (B, T, D) after the final norm. In a stream, `memory` is what
        cross-attention reads, remembered, and what stands before the frames was read when the state was made."""
        conditions = self.condition(None, len(inputs)) if conditions is None else conditions
        x, before = self.embed(inputs), 0
        if conditions.before is not None and state is None:
            if documents is not None:
                raise InputError("conversations cannot be packed with conditions that stand before the frames")
            before = conditions.before.shape[1]
            x = torch.cat([conditions.before.to(x.dtype), x], 1)
        x = x if conditions.added is None else x + conditions.added.to(x.dtype)
        at: At | None = None if documents is None else packed(documents)
        if memory is None and conditions.cross is not None:
            memory = conditions.cross.to(x.dtype)
        return self.stack(x, at, state=state, rows=rows, memory=memory)[:, before:]

    def check(self, codes: Tensor, documents: Tensor | None) -> None:
        streams = 1 + self.spec.codebooks
        if codes.ndim != 3 or codes.shape[1] != streams or not codes.shape[2] or codes.is_floating_point():
            raise InputError(f"codes should be integers (B, {streams}, T), not {codes.dtype} {tuple(codes.shape)}")
        if documents is not None and documents.shape != codes[:, 0].shape:
            raise InputError(f"documents {tuple(documents.shape)} do not fit codes {tuple(codes.shape)}")
