"""Sessions of a duplex model: a state that the caller holds, and one step of all sessions at once.

A session goes on by steps of one frame (80 ms for Mimi). In step s a stream of delay d reads its frame s - d - 1 and,
where it is the model's own, writes its frame s - d. So what the model hears in step s is frame s - 1 of the training
alignment: the frame given to a session's first step is not read, that of the second is the first it hears. A frame is
known once its last stream is: `lag` steps later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from mm.decode.sampling import Controls, Sampling, choose, controls
from mm.errors import InputError
from mm.nn.memory import Memory
from mm.nn.state import StackState, State, check_state
from mm.spec.schema import require
from mm.speech.conditions import Conditioned
from mm.speech.streams import NONE, column
from mm.tree import register, tensors

if TYPE_CHECKING:
    from mm.speech.duplex import DuplexLM

UNKNOWN = -2  # a token that is not known yet, or, where tokens are given, one that the model is to choose
TEXT = Sampling(temperature=0.7, top_k=25)  # what the official package speaks with
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
    """What a step gives. tokens (B, 1 + own): text and codes of the newest whole frame, `UNKNOWN` in sessions that
    have none yet or did not go on. written (B, 1 + own): what was chosen in this step, each stream at its own delay;
    its text comes `lag` steps before `tokens` shows it. extra: probabilities (B, size) of the further heads."""

    tokens: Tensor
    written: Tensor
    extra: tuple[Tensor, ...]


@dataclass(frozen=True)
class Hooks:
    """Called in every step, each returns what is to be used in place of what it was given: logits of the text (B, V),
    the text's tokens (B,), the codes (B, own)."""

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
        """Something of every session, (B, ...), for every row."""
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
        """What the streams (B, 1 + Q) read in this step."""
        delays = column(self.delays, self.offset.device)
        begins = self.offset[:, None] <= delays
        idle = begins if rows is None else begins | ~rows[:, None]
        now = self.tokens.gather(2, self.slots(torch.zeros_like(delays), None).unsqueeze(2)).squeeze(2)
        now = torch.where(idle, column(initial, now.device), now)
        if self.guidance is not None and self.guidance.hides != "conditions":
            hidden = self.offset[:, None] <= delays + self.guidance.hidden_frames
            if self.guidance.hides == "text":
                hidden = (delays * 0 + torch.arange(len(delays), device=delays.device) == 0).expand_as(begins)
            second = (torch.arange(len(now), device=now.device) % 2 == 1)[:, None]
            now = torch.where(second & hidden & ~begins, NONE, now)
        return now

    def advance(self, tokens: Tensor, rows: Tensor | None) -> None:
        """A step is done, in which these tokens (B, 1 + own) were written."""
        self.put(0, tokens, torch.ones_like(tokens[0]), rows)
        self.offset.add_(1 if rows is None else rows.to(self.offset.dtype))

    def newest(self, streams: int, rows: Tensor | None) -> Tensor:
        """The newest whole frame of the first streams (B, streams)."""
        delays, lag = column(self.delays[:streams], self.offset.device), self.tokens.shape[2] - 3
        found = self.tokens[:, :streams].gather(2, self.slots(delays - lag, None).unsqueeze(2)).squeeze(2)
        there = self.offset > lag
        there = there if rows is None else there & rows
        return torch.where(there[:, None], found, UNKNOWN)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget what the rows (B,) bool heard and said, or all; how they sample and their conditions stay."""
        rows = torch.ones_like(self.offset, dtype=torch.bool) if rows is None else rows
        self.offset.masked_fill_(rows, 0)
        self.stack.reset(rows)

    def sample(self, session: int, text: Sampling, audio: Sampling) -> None:
        """How one session chooses its tokens from now on."""
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
    """Controls of more rows: what any of them needs."""
    for name in ("random", "most", "filtered", "penalised"):
        setattr(held, name, max(getattr(held, name), getattr(new, name)))


def choose_text(model: DuplexLM, hidden: Tensor, state: DuplexState, hooks: Hooks) -> Tensor:
    """Hidden (rows, D) -> tokens (B,)."""
    logits, g = model.head(hidden), state.guidance
    if g is not None:
        logits = logits[::2] if g.hides == "text" else g.mix(logits)
    return hooks.text(select(hooks.text_logits(logits), state.text, state, 0))


def choose_codes(model: DuplexLM, hidden: Tensor, text: Tensor, state: DuplexState, given: Tensor | None) -> Tensor:
    """Hidden (rows, D), text (B,) -> codes (B, own), one after the other; given (B, own) or `UNKNOWN`."""
    depth, codes, token = model.depth, [], text
    cache, projected = depth.begin(hidden)
    for k in range(model.spec.own):
        logits = depth.step(projected[k], state.rows(token), k, cache)
        logits = logits if state.guidance is None else state.guidance.mix(logits)
        token = select(logits, state.audio, state, k + 1)
        if given is not None:
            token = torch.where(given[:, k] == UNKNOWN, token, given[:, k])
        codes.append(token)
    return torch.stack(codes, 1)


def select(logits: Tensor, settings: Controls, state: DuplexState, stream: int) -> Tensor:
    """(B, V) -> (B,): chance depends on a session's seed, its step and the stream alone."""
    if state.guidance is not None:
        settings = Controls(**{name: value[::2] if isinstance(value, Tensor) else value
                               for name, value in vars(settings).items()})
    return choose(logits, settings, state.offset[::state.twice] * state.tokens.shape[1] + stream)


@torch.no_grad()
def step(model: DuplexLM, heard: Tensor, state: DuplexState, rows: Tensor | None, given: Tensor | None,
         hooks: Hooks) -> Frame:
    """See `DuplexLM.step`."""
    own, wide = model.spec.own, state.rows(rows)
    check(model, state, heard, rows, given)
    check_values(model, heard, given)
    if model.spec.heard:
        state.put(1 + own, state.rows(heard), column(state.delays[1 + own:], heard.device), wide)
    inputs = state.read(model.initial, wide).unsqueeze(2)
    hidden = model.hidden(inputs, Conditioned(state.added), state=state.stack, rows=wide, memory=state.memory)[:, 0]
    text = choose_text(model, hidden, state, hooks)
    if given is not None:
        text = torch.where(given[:, 0] == UNKNOWN, text, given[:, 0])
    tokens = text[:, None]
    if own:
        codes = choose_codes(model, hidden, text, state, None if given is None else given[:, 1:])
        tokens = torch.cat([tokens, hooks.codes(codes)], 1)
    state.advance(state.rows(tokens), wide)
    newest = state.newest(1 + own, wide)[::state.twice]
    extra = tuple(head(hidden[::state.twice]).softmax(-1) for head in model.extra)
    return Frame(newest, tokens, extra)


@torch.no_grad()
def prompt(model: DuplexLM, own: Tensor, heard: Tensor, state: DuplexState, rows: Tensor | None) -> None:
    """See `DuplexLM.prompt`: the steps of all its frames, read by the temporal stack at once."""
    if own.ndim != 3 or heard.ndim != 3 or own.shape[2] != heard.shape[2] or not own.shape[2]:
        raise InputError(f"a prompt holds frames, as many said {tuple(own.shape)} as heard {tuple(heard.shape)}")
    wide, inputs, delays = state.rows(rows), [], state.delays[:own.shape[1]]
    check(model, state, heard[..., 0], rows, own[..., 0])
    check_tokens("a prompt's text", own[:, 0], model.spec.text.most)
    check_tokens("a prompt's codes", torch.cat([own[:, 1:], heard], 1), model.spec.card)
    for t in range(own.shape[2]):
        if model.spec.heard:
            state.put(own.shape[1], state.rows(heard[..., t]), column(state.delays[own.shape[1]:], own.device), wide)
        inputs.append(state.read(model.initial, wide))
        now = [own[:, k, t - d] if t >= d else torch.full_like(own[:, k, t], NONE) for k, d in enumerate(delays)]
        state.advance(state.rows(torch.stack(now, 1)), wide)
    model.hidden(torch.stack(inputs, 2), Conditioned(state.added), state=state.stack, rows=wide, memory=state.memory)


def check(model: DuplexLM, state: DuplexState, heard: Tensor, rows: Tensor | None, given: Tensor | None) -> None:
    batch, s = len(state.offset) // state.twice, model.spec
    check_state(state, model.fingerprint_of_spec, batch * state.twice, state.rows(rows))
    for name, value, streams in (("heard", heard, s.heard), ("given", given, 1 + s.own)):
        if value is not None and (tuple(value.shape) != (batch, streams) or value.is_floating_point()):
            raise InputError(f"{name} should be integers ({batch}, {streams}), not {value.dtype} {tuple(value.shape)}")


def check_values(model: DuplexLM, heard: Tensor, given: Tensor | None) -> None:
    """On a CPU alone: elsewhere this would wait for the step before."""
    if heard.device.type == "cpu":
        check_tokens("heard codes", heard, model.spec.card)
    if given is not None and given.device.type == "cpu":
        chosen = given.masked_fill(given == UNKNOWN, NONE)
        check_tokens("a given text", chosen[:, 0], model.spec.text.most)
        check_tokens("given codes", chosen[:, 1:], model.spec.card)


def check_tokens(name: str, tokens: Tensor, most: int) -> None:
    """Raises InputError for tokens that no table has; `NONE` stands for one that is not there."""
    odd = tokens[(tokens < NONE) | (tokens > most)]
    if len(odd):
        raise InputError(f"{name} should be tokens up to {most}, or {NONE} for none, not {odd[0].item()}")
