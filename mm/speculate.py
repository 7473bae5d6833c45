"""Guesses of the next tokens that an `Engine` verifies in one step; the text is that of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mm.errors import InputError
from mm.sampling import Controls, choose

if TYPE_CHECKING:
    from mm.decoder import TextDecoder


class Proposer(Protocol):
    """`start` once per engine, `begin` per prompt, `propose` per step: rows of ids so far (None: idle) -> (B, tokens).
    """

    tokens: int

    def start(self, vocab: int, slots: int, length: int, chunk: int) -> None: ...

    def begin(self, slot: int, prompt: Sequence[int]) -> None: ...

    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor: ...


class PromptLookup:
    """What followed the last `longest` (or fewer) tokens when they came before (Saxena, 2023)."""

    def __init__(self, tokens: int = 4, longest: int = 3, device: torch.device | str | None = None):
        check_tokens(tokens)
        self.tokens, self.longest, self.device = tokens, longest, device

    def start(self, vocab: int, slots: int, length: int, chunk: int) -> None:
        pass

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        pass

    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor:
        found = [self.look_up(list(ids)) if ids else [] for ids in rows]
        return torch.tensor([row + [0] * (self.tokens - len(row)) for row in found]).to(settings.seed.device)

    def look_up(self, ids: list[int]) -> list[int]:
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            for at in range(len(ids) - size - 1, -1, -1):
                if ids[at:at + size] == ids[-size:]:
                    return ids[at + size:at + size + self.tokens]
        return []


class Draft:
    """A smaller model of the same vocabulary guesses, with the settings and the randomness of each row."""

    def __init__(self, model: TextDecoder, tokens: int = 4):
        check_tokens(tokens)
        self.model, self.tokens = model.eval(), tokens

    def start(self, vocab: int, slots: int, length: int, chunk: int) -> None:
        if self.model.spec.embed.vocab != vocab:
            raise InputError(f"the draft model's vocabulary has {self.model.spec.embed.vocab} tokens, not {vocab}")
        if length > self.model.spec.context:
            raise InputError(f"the draft model's context of {self.model.spec.context} is shorter than rows of {length}")
        self.length = length + self.tokens
        self.chunk = max(chunk, self.tokens + 2)
        self.state = self.model.init_state(slots, length=self.length, chunk=self.chunk)

    @torch.no_grad()
    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        device = self.state.offset.device
        state = self.model.init_state(1, length=self.length, chunk=self.chunk)
        for at in range(0, len(prompt), self.chunk):
            self.model.hidden(torch.tensor([list(prompt[at:at + self.chunk])], device=device), state=state)
        self.state.insert(torch.tensor([slot], device=device), state)

    @torch.no_grad()
    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor:
        device = self.state.offset.device
        here = torch.tensor([ids is not None for ids in rows], device=device)
        ids = torch.tensor([list(ids[-2:]) if ids else [0, 0] for ids in rows], device=device)
        start = torch.tensor([len(ids) - 2 if ids else 0 for ids in rows], device=device)
        self.state.rewind(torch.where(here, start, self.state.offset))
        drafts = []
        for _ in range(self.tokens):
            hidden = self.model.hidden(ids, state=self.state, rows=here)
            token = choose(self.model.logits(hidden[:, -1:])[:, 0], settings, self.state.offset)
            drafts.append(token)
            ids = token[:, None]
        return torch.stack(drafts, 1)


def check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise InputError(f"speculation needs at least 1 token, not {tokens}")
