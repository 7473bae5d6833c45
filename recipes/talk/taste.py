"""What a session wants of its text beyond sampling: more or less padding, fewer repetitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.decode.sampling import penalise
from mm.nn.state import State
from mm.spec import TextStream
from mm.tree import register

from .wishes import CONTEXT, Wishes

EMPTY = -1


@dataclass
class Taste(State):
    """Of B sessions: `bonus` (B,) of the padding's logit, `penalty` (B,) of tokens among the last `reach` (B,) words,
    `recent` (B, CONTEXT), the newest at the end. `silent` are tokens between words; `used`, whether anybody asked."""

    bonus: Tensor
    penalty: Tensor
    reach: Tensor
    recent: Tensor
    silent: tuple[int, int]
    used: bool = False
    fingerprint: str = "taste"

    @classmethod
    def plain(cls, rows: int, text: TextStream, device: torch.device) -> Taste:
        """Of sessions that ask for nothing."""
        recent = torch.full((rows, CONTEXT), EMPTY, device=device)
        return cls(torch.zeros(rows, device=device), torch.ones(rows, device=device), torch.zeros_like(recent[:, 0]),
                   recent, (text.padding, text.word_end))

    def set(self, row: int, wishes: Wishes) -> None:
        """A session begins. The bonus is to logits before they are divided by the temperature."""
        self.bonus[row] = wishes.pad_mult * wishes.text.temperature
        self.penalty[row], self.reach[row] = wishes.repetition_penalty, wishes.context
        self.recent[row] = EMPTY
        self.used |= wishes.pad_mult != 0 or wishes.repetition_penalty != 1

    def insert(self, rows: Tensor, other: Taste) -> None:
        super().insert(rows, other)
        self.used |= other.used

    def season(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V)"""
        if not self.used:
            return logits
        age = torch.arange(CONTEXT, 0, -1, device=logits.device)
        told = torch.where(age <= self.reach[:, None], self.recent, EMPTY)
        seen = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
        seen.scatter_(1, torch.where(told == EMPTY, logits.shape[1], told), True)
        out = penalise(logits, self.penalty, seen[:, :-1])
        out[:, self.silent[0]] += self.bonus.to(out.dtype)
        return out

    def remember(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """The tokens (B,) that were chosen, of the rows (B,) that go on."""
        if self.used:
            word = rows & (tokens != self.silent[0]) & (tokens != self.silent[1])
            later = torch.cat([self.recent[:, 1:], tokens[:, None]], 1)
            self.recent.copy_(torch.where(word[:, None], later, self.recent))
        return tokens


register(Taste, meta=("silent", "used", "fingerprint"))
