"""Speech to text and text to speech by streams that run behind each other (Delayed Streams Modeling, Kyutai, 2025).

A model without a voice of its own writes the other side's words some frames later. A model without an input speaks a
text: each time it writes the token for a new word, the next word of a script is put into its text stream, and its voice
follows some frames later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.errors import InputError
from mm.spec import TextStream
from mm.speech.dialogue import NO_HOOKS, UNKNOWN, DuplexState, Frame
from mm.speech.streams import NONE

if TYPE_CHECKING:
    from mm.speech.duplex import DuplexLM


@dataclass
class Word:
    """A transcribed word: its tokens, and the frame in which it begins, counted from the session's first."""

    frame: int
    tokens: list[int]


def transcribe(model: DuplexLM, codes: Tensor, delay: int, state: DuplexState | None = None) -> list[list[Word]]:
    """Transcribes codes (B, Q, T) -> the words of each row. The codes should end with `delay` frames of silence, in
    which the last words are written; with a state, the words of the next frames of sessions that go on. Raises
    InputError on wrong shapes and for a model with a voice of its own."""
    if model.spec.own:
        raise InputError(f"a model with {model.spec.own} codebooks of its own is none for speech to text")
    if codes.ndim != 3:
        raise InputError(f"codes should be (B, {model.spec.heard}, T), not {tuple(codes.shape)}")
    state = model.init_state(len(codes)) if state is None else state
    words: list[list[Word]] = [[] for _ in range(len(codes))]
    first = state.offset[::state.twice].tolist()
    for t in range(codes.shape[2]):
        tokens = model.step(codes[..., t], state).written[:, 0].tolist()
        for row, token in enumerate(tokens):
            if token == model.spec.text.word_end:
                words[row].append(Word(max(first[row] + t + 2 - delay, 0), []))
            elif token != model.spec.text.padding:
                if not words[row]:  # the rest of a word that began before
                    words[row].append(Word(max(first[row] + t + 1 - delay, 0), []))
                words[row][-1].tokens.append(token)
    return [[word for word in row if word.tokens] for row in words]


class Script:
    """Words for the text stream of one session.

    words: the tokens of each, or a number, a pause in frames. ahead: how many words earlier a word is read in the
    second text stream. padding: the most padding tokens that the model may write before the next word; first: those
    before the first one. `ended` is the step in which the model asked for a word after the last, None until then.
    Raises InputError for tokens outside the vocabulary."""

    def __init__(self, words: Sequence[Sequence[int] | int], text: TextStream, *, ahead: int = 0, padding: int = 8,
                 first: int = 2):
        if ahead and not text.second:
            raise InputError("this model has no second text stream that words could be read in ahead")
        odd = [token for word in words if not isinstance(word, int) for token in word if not 0 <= token < text.vocab]
        if odd:
            raise InputError(f"a script's words are tokens from 0 to {text.vocab - 1}, not {odd[0]}")
        self.words, self.text, self.ahead, self.padding = deque(words), text, ahead, padding
        self.left, self.forced = first, first
        self.now: deque[int] = deque()
        self.coming: deque[int] = deque()
        self.ended: int | None = None

    def next(self, step: int, token: int) -> int:
        """Returns the token to write in a step for which the model chose `token`."""
        asked = token == self.text.word_end or self.left <= 0
        begins = not self.now and self.forced <= 0 and asked and self.take(step)
        if not begins:
            self.left, self.forced = max(self.left - 1, 0), max(self.forced - 1, 0)
        if not self.ahead:
            return self.text.word_end if begins else self.now.popleft() if self.now else self.text.padding
        second = NONE
        if begins:  # announced in the second stream, so that its first token is read at once
            second = self.text.word_end
        elif self.coming:
            second = self.coming.popleft()
        first = self.now.popleft() if self.now else self.text.padding
        return (second + 1) * (self.text.vocab + 1) + first

    def take(self, step: int) -> bool:
        """Goes on to the next word; returns whether the model is to be notified of one."""
        if not self.words:
            announced = bool(self.ahead) and self.ended is None
            self.ended = step if self.ended is None else self.ended
            return announced
        word = self.words.popleft()
        if isinstance(word, int):
            self.forced = word
            return False
        self.now.extend(word)
        if self.ahead:
            later = [word for word in self.words if not isinstance(word, int)]
            self.coming.extend(later[self.ahead - 1] if len(later) >= self.ahead else ())
        self.left = self.padding
        return True


def speak(model: DuplexLM, scripts: Sequence[Script], state: DuplexState, delay: int, *, silence: int = 4,
          most: int = 3000) -> Iterator[Frame]:
    """Yields the steps of one session per script, until `silence` frames after the last voice has ended; frames whose
    `tokens` hold codes carry sound from step `delay` on. delay: of the voice behind its text, in frames. At most `most`
    steps. Raises InputError for a model that has an input."""
    s = model.spec
    if s.heard or not s.own or len(scripts) * state.twice != len(state.offset):
        raise InputError("a text is said by a model that hears nothing, with one session a script")
    heard = torch.zeros(len(scripts), 0, dtype=torch.long, device=state.offset.device)
    for step in range(most):
        ends = [script.ended for script in scripts]
        if None not in ends and step >= max(ends) + delay + silence:
            return

        def text(tokens: Tensor, step: int = step) -> Tensor:
            chosen = [script.next(step, token) for script, token in zip(scripts, tokens.tolist(), strict=True)]
            return torch.tensor(chosen, device=tokens.device)

        def codes(found: Tensor, step: int = step) -> Tensor:
            early = torch.tensor([step < lag + delay for lag in s.delays[1:1 + s.own]], device=found.device)
            return found.masked_fill(early, NONE)
        given = torch.full((len(scripts), 1 + s.own), UNKNOWN, device=state.offset.device)
        if step < delay:  # before its voice begins
            given[:, 1:] = NONE
        yield model.step(heard, state, given=given, hooks=replace(NO_HOOKS, text=text, codes=codes))
