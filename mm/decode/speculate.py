"""Speculation: guesses of the next tokens, which an `Engine` verifies in one step; the text is that of plain
decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.decode.requests import LanguageModel
from mm.decode.sampling import Controls, choose
from mm.errors import InputError
from mm.nn.multi_token import look_ahead
from mm.nn.state import StackState
from mm.positions.visibility import EMPTY, At


class Proposer:
    """Guesses `tokens` tokens in every step, for the rows of an engine."""

    tokens: int

    def start(self, model: LanguageModel, slots: int, length: int, chunk: int) -> None:
        """Take the model and sizes of an engine, once. Raises InputError where they do not fit."""

    def begin(self, slot: int, prompt: Sequence[int], hidden: Tensor) -> None:
        """Begin a row. hidden: (R, D) of the last R tokens of its prompt; those before are a shared prefix."""

    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor:
        """Guess in every step: rows of ids so far (None: idle), the last one not yet read -> guesses (B, tokens)."""
        raise NotImplementedError

    def follow(self, hidden: Tensor, count: Tensor) -> None:
        """Take the outcome of a step: hidden (B, tokens + 1, D) of the ids read, of which the first count (B,) stay."""


class PromptLookup(Proposer):
    """Guesses the tokens that followed when the last `longest` (or fewer) tokens came before (Saxena, 2023)."""

    def __init__(self, tokens: int = 4, longest: int = 3):
        check_tokens(tokens)
        self.tokens, self.longest = tokens, longest

    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor:
        found = [self.look_up(list(ids)) if ids else [] for ids in rows]
        return torch.tensor([row + [0] * (self.tokens - len(row)) for row in found]).to(settings.seed.device)

    def look_up(self, ids: list[int]) -> list[int]:
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            for at in range(len(ids) - size - 1, -1, -1):
                if ids[at:at + size] == ids[-size:]:
                    return ids[at + size:at + size + self.tokens]
        return []


class Draft(Proposer):
    """Guesses by a smaller model of the same vocabulary, with the settings and the randomness of each row."""

    def __init__(self, model: LanguageModel, tokens: int = 4):
        check_tokens(tokens)
        self.model, self.tokens = model.eval(), tokens

    def start(self, model: LanguageModel, slots: int, length: int, chunk: int) -> None:
        mine, vocab = self.model.spec.embed.vocab, model.spec.embed.vocab
        if mine != vocab:
            raise InputError(f"the draft model's vocabulary has {mine} tokens, not {vocab}")
        if length > self.model.spec.context:
            raise InputError(f"the draft model's context of {self.model.spec.context} is shorter than rows of {length}")
        self.length = length + self.tokens
        self.chunk = max(chunk, self.tokens + 2)
        self.state = self.model.init_state(slots, length=self.length, chunk=self.chunk)

    @torch.no_grad()
    def begin(self, slot: int, prompt: Sequence[int], hidden: Tensor) -> None:
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


class Ahead(Proposer):
    """Guesses by the model's own multi-token heads (DeepSeek-V3), one token each, every head from the hidden states of
    the one before.

    A head that read a guess holds a wrong row when the guess was wrong. So every step reads again the last
    2 x tokens rows: the up to `tokens` - 1 that may be wrong, and the up to `tokens` + 1 that are new. After a shared
    prefix the heads see only the rest of the prompt."""

    def start(self, model: LanguageModel, slots: int, length: int, chunk: int) -> None:
        self.model, self.tokens, self.length = model, len(model.ahead), length
        if not model.ahead:
            raise InputError("the model has no heads that look ahead")
        self.chunk = max(chunk, 2 * self.tokens)
        self.states = self.new_states(slots)
        here = model.embed.tokens.weight
        self.hidden = here.new_zeros(slots, 2 * self.tokens, here.shape[1])  # of the last tokens that were read
        self.first = torch.zeros(slots, dtype=torch.long, device=here.device)  # positions that are known begin here

    def new_states(self, rows: int) -> list[StackState]:
        return [head.stack.init_state(rows, length=self.length, chunk=self.chunk) for head in self.model.ahead]

    @torch.no_grad()
    def begin(self, slot: int, prompt: Sequence[int], hidden: Tensor) -> None:
        device, states, first = hidden.device, self.new_states(1), len(prompt) - len(hidden)
        ids = torch.tensor([prompt[first:]], device=device)
        at = At(torch.arange(first, len(prompt), device=device)[None])
        look_ahead(self.model.ahead, self.model.embed, ids, hidden[None], at, states)
        row = torch.tensor([slot], device=device)
        for held, new in zip(self.states, states, strict=True):
            held.insert(row, new)
        self.first[slot] = first
        self.hidden[slot] = F.pad(hidden, (0, 0, self.hidden.shape[1], 0))[-self.hidden.shape[1]:]

    @torch.no_grad()
    def propose(self, rows: Sequence[Sequence[int] | None], settings: Controls) -> Tensor:
        device, width = self.first.device, self.hidden.shape[1]
        last = torch.tensor([[0] * (width - len(ids)) + list(ids[-width:]) if ids else [0] * width for ids in rows],
                            device=device)
        end = torch.tensor([len(ids) - 1 if ids else 0 for ids in rows], device=device)  # how many tokens were read
        place = end[:, None] + torch.arange(-width, 0, device=device)
        at = At(torch.where(place >= self.first[:, None], place, EMPTY))
        hidden, drafts = self.hidden, []
        for k, (head, state) in enumerate(zip(self.model.ahead, self.states, strict=True), 1):
            later = At((place + k).clamp(max=self.length - 1))
            hidden = head(hidden, self.model.embed(last, later), at, state)
            drafts.append(choose(self.model.logits(hidden[:, -1]), settings, end + k))
            last = torch.cat([last[:, 1:], drafts[-1][:, None]], 1)
        return torch.stack(drafts, 1)

    def follow(self, hidden: Tensor, count: Tensor) -> None:
        known = torch.cat([self.hidden, hidden.to(self.hidden.dtype)], 1)
        index = count[:, None] + torch.arange(self.hidden.shape[1], device=count.device)
        self.hidden = known.gather(1, index[..., None].expand(-1, -1, known.shape[2]))


def check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise InputError(f"speculation needs at least 1 token, not {tokens}")
