"""The state of sessions with a duplex model: which tokens its streams read next, guidance, hooks, sampling.

A session goes on by steps of one frame (80 ms for Mimi). In step s a stream of delay d reads its frame s - d - 1 and,
where it is one of the model's own, writes its frame s - d. So the input of step s is frame s - 1 of the training
alignment: the frame given to a session's first step is not read, and that of its second step is the first input. A
frame is known once its last stream is: `lag` steps later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mm.decode.sampling import Controls, Sampling, choose, controls
from mm.errors import InputError
from mm.nn.linear import constant
from mm.nn.memory import Memory
from mm.nn.state import StackState, State
from mm.spec.schema import require
from mm.speech.streams import NONE
from mm.tree import register, tensors

UNKNOWN = -2  # a token that is not known yet, or, where tokens are given, one that the model is to choose
TEXT = Sampling(temperature=0.7, top_k=25)  # the official package's settings
AUDIO = Sampling(temperature=0.8, top_k=250)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans, 2022): logits `scale` times as far from those of a second row, which
    knows no conditions. That row may also not read the text (whose own logits then stay as they are), or not read the
    first frames up to `hidden_frames`."""

    scale: float
    hides: Literal["conditions", "text", "start"] = "conditions"
    hidden_frames: int = 0

    def __post_init__(self) -> None:
        require(self.hides in ("conditions", "text", "start"), f"Guidance.hides has no {self.hides!r}")
        require(self.hides == "start" or not self.hidden_frames, "Guidance.hidden_frames are for hides='start'")

    def mix(self, logits: Tensor) -> Tensor:
        """(2 B, V) -> (B, V)"""
        given, without = logits[::2], logits[1::2]
        return without + (given - without) * self.scale


class Frame(NamedTuple):
    """The result of a step.

    tokens (B, 1 + own): text and codes of the newest whole frame, `UNKNOWN` in sessions that have none yet or did not
    go on. written (B, 1 + own): the tokens chosen in this step, each stream at its own delay; its text comes `lag`
    steps before `tokens` shows it. extra: probabilities (B, size) of the further heads."""

    tokens: Tensor
    written: Tensor
    extra: tuple[Tensor, ...]


@dataclass(frozen=True)
class Hooks:
    """Functions called in every step, each of which may replace its argument: the text's logits (B, V), the text's
    tokens (B,), the codes (B, own)."""

    text_logits: Callable[[Tensor], Tensor] = lambda logits: logits
    text: Callable[[Tensor], Tensor] = lambda tokens: tokens
    codes: Callable[[Tensor], Tensor] = lambda codes: codes


NO_HOOKS = Hooks()


@dataclass
class DuplexState(State):
    """Sessions of one model. offset (B,): steps done; tokens (B, 1 + Q, lag + 3): the streams as they are read, slot =
    step mod (lag + 2), the last for what is not to be kept. With guidance a session has two rows, 2 i and 2 i + 1."""

    offset: Tensor
    tokens: Tensor
    stack: StackState
    added: Tensor | None
    memory: Memory | None
    text: Controls
    audio: Controls
    delays: tuple[int, ...]
    guidance: Guidance | None
    fingerprint: str

    @property
    def twice(self) -> int:
        return 1 if self.guidance is None else 2

    def rows(self, x: Tensor | None) -> Tensor | None:
        """A value per session, (B, ...) -> one per row."""
        return x if x is None or self.twice == 1 else x.repeat_interleave(2, 0)

    def slots(self, later: Tensor, rows: Tensor | None) -> Tensor:
        """(B, S) of tokens that are read `later` (S,) steps from now."""
        slot = (self.offset[:, None] + later) % (self.tokens.shape[2] - 1)
        return slot if rows is None else torch.where(rows[:, None], slot, self.tokens.shape[2] - 1)

    def put(self, first: int, tokens: Tensor, later: Tensor, rows: Tensor | None) -> None:
        """Tokens (B, S) of the streams from `first` on."""
        part = self.tokens[:, first:first + tokens.shape[1]]
        part.scatter_(2, self.slots(later, rows).unsqueeze(2), tokens.unsqueeze(2))

    def read(self, initial: tuple[int, ...], rows: Tensor | None) -> Tensor:
        """The tokens (B, 1 + Q) that the streams read in this step."""
        delays = constant(self.delays, self.offset.device)
        begins = self.offset[:, None] <= delays
        idle = begins if rows is None else begins | ~rows[:, None]
        now = self.tokens.gather(2, self.slots(torch.zeros_like(delays), None).unsqueeze(2)).squeeze(2)
        now = torch.where(idle, constant(initial, now.device), now)
        if self.guidance is not None and self.guidance.hides != "conditions":
            hidden = self.offset[:, None] <= delays + self.guidance.hidden_frames
            if self.guidance.hides == "text":
                hidden = (delays * 0 + torch.arange(len(delays), device=delays.device) == 0).expand_as(begins)
            second = (torch.arange(len(now), device=now.device) % 2 == 1)[:, None]
            now = torch.where(second & hidden & ~begins, NONE, now)
        return now

    def advance(self, tokens: Tensor, rows: Tensor | None) -> None:
        """Ends a step in which these tokens (B, 1 + own) were written."""
        self.put(0, tokens, torch.ones_like(tokens[0]), rows)
        self.offset.add_(1 if rows is None else rows.to(self.offset.dtype))

    def newest(self, streams: int, rows: Tensor | None) -> Tensor:
        """The newest whole frame of the first streams (B, streams)."""
        delays, lag = constant(self.delays[:streams], self.offset.device), self.tokens.shape[2] - 3
        found = self.tokens[:, :streams].gather(2, self.slots(delays - lag, None).unsqueeze(2)).squeeze(2)
        there = self.offset > lag
        there = there if rows is None else there & rows
        return torch.where(there[:, None], found, UNKNOWN)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forgets the streams of rows (B,) bool, or of all; sampling settings and conditions stay."""
        rows = torch.ones_like(self.offset, dtype=torch.bool) if rows is None else rows
        self.offset.masked_fill_(rows, 0)
        self.stack.reset(rows)

    def sample(self, session: int, text: Sampling, audio: Sampling) -> None:
        """Sets how one session chooses its tokens from now on."""
        for name, settings in (("text", text), ("audio", audio)):
            held, new = getattr(self, name), controls([settings] * self.twice, self.offset.device)
            place = slice(session * self.twice, (session + 1) * self.twice)
            for (_, mine), (_, theirs) in zip(tensors(held), tensors(new), strict=True):
                mine[place] = theirs
            widen(held, new)

    def insert(self, rows: Tensor, other: DuplexState) -> None:
        super().insert(rows, other)
        widen(self.text, other.text)
        widen(self.audio, other.audio)


register(DuplexState, meta=("delays", "guidance", "fingerprint"))


def widen(held: Controls, new: Controls) -> None:
    """Extends the controls of held rows to what new ones need."""
    for name in ("random", "most", "filtered", "penalised"):
        setattr(held, name, max(getattr(held, name), getattr(new, name)))


def select(logits: Tensor, settings: Controls, state: DuplexState, stream: int) -> Tensor:
    """(B, V) -> (B,): chance depends on a session's seed, its step and the stream alone."""
    if state.guidance is not None:
        settings = Controls(**{name: value[::2] if isinstance(value, Tensor) else value
                               for name, value in vars(settings).items()})
    return choose(logits, settings, state.offset[::state.twice] * state.tokens.shape[1] + stream)


def check_tokens(name: str, tokens: Tensor, most: int) -> None:
    """Raises InputError for tokens that no table has; `NONE` stands for one that is not there."""
    odd = tokens[(tokens < NONE) | (tokens > most)]
    if len(odd):
        raise InputError(f"{name} should be tokens up to {most}, or {NONE} for none, not {odd[0].item()}")
