"""Many conversations in one step: what all of them hear, encoded, answered and decoded as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.nn.graph import Replay
from mm.speech.dialogue import UNKNOWN, Hooks

from .partner import Partner
from .taste import Taste
from .wishes import Wishes


class Said(NamedTuple):
    """A frame that the model spoke, (frame,) float32, and its token of text."""

    wave: np.ndarray
    token: int


class Dialogues:
    """Conversations by key, each a row of one state. On a CPU there are as many rows as conversations, and what a row
    holds is copied when one begins or ends; on a GPU there are `rows` from the beginning, and a step, from samples to
    samples, is one CUDA graph."""

    def __init__(self, partner: Partner, rows: int):
        self.partner, self.static = partner, partner.device.type == "cuda"
        self.keys: list[Hashable | None] = []
        self.resize(rows if self.static else 1, [])

    def __contains__(self, key: Hashable) -> bool:
        return key in self.keys

    @torch.no_grad()
    def resize(self, rows: int, kept: list[int]) -> None:
        """Room for `rows`, the first of which go on with those kept."""
        model, codec, device = self.partner.model, self.partner.codec, self.partner.device
        lm, sound = model.init_state(rows, sinks=self.partner.sinks), codec.init_state(rows)
        taste = Taste.plain(rows, model.spec.text, device)
        if kept:
            first, old = torch.arange(len(kept), device=device), torch.tensor(kept, device=device)
            for new, held in ((lm, self.lm), (sound, self.sound), (taste, self.taste)):
                new.insert(first, held.select(old))
        self.lm, self.sound, self.taste = lm, sound, taste
        self.keys = [self.keys[row] for row in kept] + [None] * (rows - len(kept))
        self.wave = torch.zeros(rows, 1, self.partner.frame, device=device)
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)
        self.advance = Replay(self.go) if self.static else self.go

    def enter(self, key: Hashable, wishes: Wishes) -> None:
        """A conversation begins. Raises ValueError where a fixed number of rows has no place left."""
        if None not in self.keys and not self.static:
            self.resize(len(self.keys) + 1, list(range(len(self.keys))))
        self.begin(self.keys.index(None), wishes)
        self.keys[self.keys.index(None)] = key

    @torch.no_grad()
    def begin(self, row: int, wishes: Wishes) -> None:
        at = torch.zeros_like(self.rows)
        at[row] = True
        before = self.kinds
        self.partner.model.begin(self.lm, self.partner.conditions(len(self.rows)), rows=at)
        self.sound.reset(at)
        self.lm.sample(row, wishes.text, wishes.audio)
        self.taste.set(row, wishes)
        if self.static and self.kinds != before:
            self.advance.renew()

    @property
    def kinds(self) -> tuple[int, ...]:
        """What a captured step does or leaves out."""
        return (*(getattr(held, name) for held in (self.lm.text, self.lm.audio)
                  for name in ("random", "most", "filtered", "penalised")), self.taste.used)

    def leave(self, key: Hashable) -> None:
        row = self.keys.index(key)
        self.keys[row] = None
        if not self.static and len(self.keys) > 1:
            self.resize(len(self.keys) - 1, [i for i in range(len(self.keys)) if i != row])

    def step(self, heard: Mapping[Hashable, np.ndarray]) -> dict[Hashable, Said | None]:
        """A frame (frame,) of each conversation that goes on -> what it says, None before its first whole frame."""
        if not heard:
            return {}
        places = {key: self.keys.index(key) for key in heard}
        wave, going = torch.zeros(self.wave.shape), torch.zeros(len(self.keys), dtype=torch.bool)
        for key, row in places.items():
            wave[row, 0], going[row] = torch.from_numpy(heard[key]), True
        self.wave.copy_(wave)
        self.rows.copy_(going)
        said, tokens, spoke = (x.cpu() for x in self.advance())
        return {key: Said(said[row, 0].numpy().copy(), int(tokens[row])) if spoke[row] else None
                for key, row in places.items()}

    @torch.no_grad()
    def go(self) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the rows that go on: waves (B, 1, frame), tokens (B,), and whether a row spoke (B,). The frame
        given to a conversation's first step is not read (`mm.speech.dialogue`), nor encoded: the codec begins with the
        second."""
        p = self.partner
        hears = self.rows & (self.lm.offset > 0)
        codes = p.codec.encode(self.wave, state=self.sound, rows=hears, codebooks=p.model.spec.heard)
        hooks = Hooks(text_logits=self.taste.season, text=lambda tokens: self.taste.remember(tokens, self.rows))
        frame = p.model.step(codes[..., 0], self.lm, rows=self.rows, hooks=hooks)
        spoke = self.rows & (frame.tokens[:, 1] != UNKNOWN)
        wave = p.codec.decode(frame.tokens[:, 1:, None].clamp(min=0), state=self.sound, rows=spoke)
        return wave, frame.tokens[:, 0], spoke
