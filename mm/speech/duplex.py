"""The duplex model: it listens and speaks at once, as streams of codes, and writes its own words as text.

Moshi, Défossez et al., 2024. A temporal stack reads one frame of all streams a step; its output gives the next token of
text and, one after the other by a depth transformer, the next codes of the model's own voice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mm import spec
from mm.checkpoint.pretrained import Pretrained
from mm.decode.sampling import GREEDY, Sampling, controls
from mm.errors import InputError
from mm.nn.linear import Linear, constant
from mm.nn.memory import Memory
from mm.nn.state import StackState, check_state
from mm.nn.transformer import Transformer
from mm.positions.visibility import At, packed
from mm.spec import schema
from mm.speech.conditions import Conditioned, Conditions, Value
from mm.speech.depth import DepthDecoder
from mm.speech.dialogue import (
    NO_HOOKS,
    UNKNOWN,
    DuplexState,
    Frame,
    Guidance,
    Hooks,
    check_tokens,
    select,
)
from mm.speech.families import FAMILIES
from mm.speech.streams import NONE, CodeTables, TextTable, aligned, delayed


class Logits(NamedTuple):
    """text (B, T, V), audio (B, own, T, card): of each frame's own tokens, NaN where a frame ends before its delay."""

    text: Tensor
    audio: Tensor


class Frames(NamedTuple):
    """Streams by step, (B, 1 + Q, T): the temporal stack reads `inputs` and is to write `targets` in the same step;
    `known` (bool) is true where a target is a token of the sequence. Step s holds, of a stream with delay d, frame
    s - d as its target and frame s - d - 1 as its input."""

    inputs: Tensor
    targets: Tensor
    known: Tensor


class DuplexLM(Pretrained):
    """codes (B, 1 + Q, T), text first, then the model's own codebooks, then those of the other side -> `Logits`,
    aligned with the codes."""

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
        self.fingerprint_of_spec = schema.fingerprint(s)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the heads' projections with a std of D^-0.5; the other parts have rules of their own."""
        for part in (self.head, *self.extra):
            nn.init.normal_(part.weight, std=part.weight.shape[1] ** -0.5)

    @property
    def initial(self) -> tuple[int, ...]:
        """The tokens before the first one of each stream."""
        return (self.spec.text.vocab, *[self.spec.card] * self.spec.codebooks)

    def condition(self, values: Mapping[str, Value] | None = None, batch: int = 1) -> Conditioned:
        """Reads values by name, one per row, for `forward`. Raises InputError."""
        if self.conditions is None:
            if values:
                raise InputError(f"this model knows no conditions, not {next(iter(values))!r}")
            return Conditioned()
        return self.conditions(values or {}, batch)

    def frames(self, codes: Tensor, documents: Tensor | None = None) -> Frames:
        """Returns inputs and targets step by step. documents (B, T): ids of packed conversations, -1 for padding."""
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
        """Embeds inputs (B, 1 + Q, T) -> (B, T, D)."""
        text, end = inputs[:, 0], self.spec.text.end
        text = text if end is None else text.masked_fill(text == end, self.spec.text.padding)
        return self.codes(inputs[:, 1:]) + self.text(text)

    def hidden(self, inputs: Tensor, conditions: Conditioned | None = None, *, documents: Tensor | None = None,
               state: StackState | None = None, rows: Tensor | None = None,
               memory: Tensor | Memory | None = None) -> Tensor:
        """Reads streams (B, 1 + Q, T) -> (B, T, D) after the final norm. In a stream, `memory` holds the keys and
        values of cross-attention, and conditions in front of the frames were read when the state was made."""
        if conditions is None:
            conditions = Conditioned() if self.conditions is None else self.condition(None, len(inputs))
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

    # ------------------------------------------------------------------------------------- sessions
    def init_state(self, batch: int, *, conditions: Mapping[str, Value] | None = None, text: Sampling = GREEDY,
                   audio: Sampling = GREEDY, guidance: Guidance | None = None, length: int | None = None,
                   chunk: int = 1, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                   cache: Literal["full", "int8"] = "full", sinks: int = 0) -> DuplexState:
        """`batch` sessions that have not begun. conditions: values by name, one a session. text, audio: how tokens are
        chosen (`dialogue.TEXT` and `AUDIO` are the official settings). length: frames that a session remembers where
        a layer has no window (default: the context); chunk: the most frames that a prompt is read in at once; sinks:
        the first so many frames stay in sight, in place of a window's oldest (`Window.first`). Raises InputError."""
        rows, s = batch * (1 if guidance is None else 2), self.spec
        device = torch.device(device or self.text.weight.device)
        windows = [spec.attention(layer).window.left for layer in s.stack.layers]
        most = None if None not in windows else max(length or s.context, *(chunk + (left or 0) for left in windows))
        stack = self.stack.init_state(rows, length=most, chunk=chunk, dtype=dtype, device=device, cache=cache,
                                      first=sinks)
        tokens = torch.zeros(rows, 1 + s.codebooks, s.lag + 3, dtype=torch.long, device=device)
        state = DuplexState(torch.zeros(rows, dtype=torch.long, device=device), tokens, stack, None, None,
                            controls([text] * rows, device), controls([audio] * rows, device), s.delays, guidance,
                            self.fingerprint_of_spec)
        if self.conditions is not None or conditions:
            self.begin(state, conditions)
        return state

    @torch.no_grad()
    def begin(self, state: DuplexState, conditions: Mapping[str, Value] | None = None,
              rows: Tensor | None = None) -> None:
        """Starts new sessions in all rows, or in those of rows (B,) bool, with their conditions: values by name, one
        for each of the B sessions. The input of cross-attention may not be longer than when the state was made."""
        batch = len(state.offset) // state.twice
        state.reset(state.rows(rows))
        if self.conditions is None and not conditions:
            return
        values = {name: [one for value in held for one in (value, None)[:state.twice]]
                  for name, held in (conditions or {}).items()}
        made = self.condition(values, batch * state.twice)
        chosen = torch.ones_like(state.offset, dtype=torch.bool) if rows is None else state.rows(rows)
        if made.added is not None and state.added is None:
            state.added = made.added
        elif made.added is not None:  # where it lies: a captured step reads it there
            state.added.copy_(torch.where(chosen[:, None, None], made.added, state.added))
        if made.cross is not None:
            memory = self.stack.remember(made.cross.to(self.text.weight.dtype))
            if state.memory is None:
                state.memory = replace(memory, at=At(memory.at.position.clone()))
            else:
                for row in chosen.nonzero().flatten().tolist():
                    state.memory.insert(row, memory.select(torch.tensor([row])))
        if made.before is not None:
            x = made.before if made.added is None else made.before + made.added
            self.stack(x.to(self.text.weight.dtype), state=state.stack, rows=chosen, memory=state.memory)

    @torch.no_grad()
    def step(self, heard: Tensor, state: DuplexState, *, rows: Tensor | None = None, given: Tensor | None = None,
             hooks: Hooks = NO_HOOKS) -> Frame:
        """One frame of every session: heard (B, heard) codes of the other side, of which a session's first are not read
        (`dialogue` says which frame is which). rows: (B,) bool, the sessions that go on. given: (B, 1 + own) tokens to
        write in this step, `UNKNOWN` where the model chooses. Raises InputError on wrong shapes and a foreign state,
        and on a CPU for tokens that are none of the model's."""
        own, wide = self.spec.own, state.rows(rows)
        self.check_step(state, heard, rows, given)
        self.check_values(heard, given)
        if self.spec.heard:
            state.put(1 + own, state.rows(heard), constant(state.delays[1 + own:], heard.device), wide)
        inputs = state.read(self.initial, wide).unsqueeze(2)
        hidden = self.hidden(inputs, Conditioned(state.added), state=state.stack, rows=wide, memory=state.memory)[:, 0]
        text = self.choose_text(hidden, state, hooks)
        if given is not None:
            text = torch.where(given[:, 0] == UNKNOWN, text, given[:, 0])
        tokens = text[:, None]
        if own:
            codes = self.choose_codes(hidden, text, state, None if given is None else given[:, 1:])
            tokens = torch.cat([tokens, hooks.codes(codes)], 1)
        state.advance(state.rows(tokens), wide)
        newest = state.newest(1 + own, wide)[::state.twice]
        extra = tuple(head(hidden[::state.twice]).softmax(-1) for head in self.extra)
        return Frame(newest, tokens, extra)

    @torch.no_grad()
    def prompt(self, own: Tensor, heard: Tensor, state: DuplexState, *, rows: Tensor | None = None) -> None:
        """Read frames of both sides before sessions go on, own (B, 1 + own, T) and heard (B, heard, T): as T steps that
        are given these, aligned by frame, which the temporal stack reads at once. A text prompt is tokens over silent
        codes, a voice prompt codes under padding. The last frames' delayed codes are left to the model."""
        if own.ndim != 3 or heard.ndim != 3 or own.shape[2] != heard.shape[2] or not own.shape[2]:
            raise InputError(f"a prompt holds frames, as many said {tuple(own.shape)} as heard {tuple(heard.shape)}")
        wide, inputs, delays = state.rows(rows), [], state.delays[:own.shape[1]]
        self.check_step(state, heard[..., 0], rows, own[..., 0])
        check_tokens("a prompt's text", own[:, 0], self.spec.text.most)
        check_tokens("a prompt's codes", torch.cat([own[:, 1:], heard], 1), self.spec.card)
        later = constant(state.delays[own.shape[1]:], own.device)
        for t in range(own.shape[2]):
            if self.spec.heard:
                state.put(own.shape[1], state.rows(heard[..., t]), later, wide)
            inputs.append(state.read(self.initial, wide))
            now = [own[:, k, t - d] if t >= d else torch.full_like(own[:, k, t], NONE) for k, d in enumerate(delays)]
            state.advance(state.rows(torch.stack(now, 1)), wide)
        self.hidden(torch.stack(inputs, 2), Conditioned(state.added), state=state.stack, rows=wide,
                    memory=state.memory)

    def choose_text(self, hidden: Tensor, state: DuplexState, hooks: Hooks) -> Tensor:
        """Hidden (rows, D) -> tokens (B,)."""
        logits, g = self.head(hidden), state.guidance
        if g is not None:
            logits = logits[::2] if g.hides == "text" else g.mix(logits)
        return hooks.text(select(hooks.text_logits(logits), state.text, state, 0))

    def choose_codes(self, hidden: Tensor, text: Tensor, state: DuplexState, given: Tensor | None) -> Tensor:
        """Hidden (rows, D), text (B,) -> codes (B, own), one after the other; given (B, own) or `UNKNOWN`."""
        codes, token = [], text
        cache, projected = self.depth.begin(hidden)
        for k in range(self.spec.own):
            logits = self.depth.step(projected[k], state.rows(token), k, cache)
            logits = logits if state.guidance is None else state.guidance.mix(logits)
            token = select(logits, state.audio, state, k + 1)
            if given is not None:
                token = torch.where(given[:, k] == UNKNOWN, token, given[:, k])
            codes.append(token)
        return torch.stack(codes, 1)

    # ------------------------------------------------------------------------------------- checks
    def check(self, codes: Tensor, documents: Tensor | None) -> None:
        streams = 1 + self.spec.codebooks
        if codes.ndim != 3 or codes.shape[1] != streams or not codes.shape[2] or codes.is_floating_point():
            raise InputError(f"codes should be integers (B, {streams}, T), not {codes.dtype} {tuple(codes.shape)}")
        if documents is not None and documents.shape != codes[:, 0].shape:
            raise InputError(f"documents {tuple(documents.shape)} do not fit codes {tuple(codes.shape)}")

    def check_step(self, state: DuplexState, heard: Tensor, rows: Tensor | None, given: Tensor | None) -> None:
        batch, s = len(state.offset) // state.twice, self.spec
        check_state(state, self.fingerprint_of_spec, batch * state.twice, state.rows(rows))
        for name, value, streams in (("heard", heard, s.heard), ("given", given, 1 + s.own)):
            if value is not None and (tuple(value.shape) != (batch, streams) or value.is_floating_point()):
                raise InputError(f"{name} should be integers ({batch}, {streams}), not {value.dtype} "
                                 f"{tuple(value.shape)}")

    def check_values(self, heard: Tensor, given: Tensor | None) -> None:
        """On a CPU alone: elsewhere this would wait for the step before."""
        if heard.device.type == "cpu":
            check_tokens("heard codes", heard, self.spec.card)
        if given is not None and given.device.type == "cpu":
            chosen = given.masked_fill(given == UNKNOWN, NONE)
            check_tokens("a given text", chosen[:, 0], self.spec.text.most)
            check_tokens("given codes", chosen[:, 1:], self.spec.card)
