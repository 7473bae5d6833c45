"""Dialogues composed of utterances: who asks what when, how the model answers, and what both channels then hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..data.words import MAIN
from ..duplex.questions import KINDS, Kind
from .acoustics import heard
from .talkers import PEOPLE, PEOPLE_HELD_OUT, Line
from .voices import AFTER, BEFORE, BLOCK, RATE, powers
from .word_times import Times

FRAME = 1920  # samples: answers begin on a frame of the codec, so that each has the same codes wherever it is said
SHARES = (0.5, 0.4, 0.1)  # of KINDS
HUMAN = 0.25  # of the words to repeat, where people say them
LONG = (3.0, 6.0)  # seconds of silence before some questions that are alone
DELAY = 0.62  # seconds from the end of a question to its answer, before this is moved on to a frame. It is always
# the same: a model that is to expect an answer at several times may let all of them pass
AHEAD = 5 * FRAME  # samples: an answer is written before it is said, a word a frame. Else its first sounds would tell
# a model in training which of the few sentences this is, and what was asked would not be learned
QUIET = (4.0, 8.0)  # seconds of a dialogue without a question
UNSAID = RATE // 2  # samples that an answer lasts which is only written
INTERRUPTED = 0.3  # of the answers that are not the last: 15 % of all
STOPPING, FADE = (0.2, 0.3), 0.03  # the model is silent so soon after it is interrupted
HESITANT, PAUSE = 0.15, (0.3, 0.5)  # how often a question has a pause in it
STRETCH = (0.88, 1.13)  # of time and pitch


@dataclass(frozen=True)
class Pace:
    """How often a dialogue has no, one, two... questions; seconds of silence before the first one, from an answer to
    the next one, and after the last answer; whether answers are said, or only written."""

    turns: tuple[float, ...]
    opening: tuple[float, float]
    gap: tuple[float, float]
    closing: tuple[float, float]
    said: bool = True


TALK = Pace((0.06, 0.22, 0.40, 0.32), (0.2, 2.0), (0.3, 1.5), (0.4, 1.2))
DRILL = Pace((0.02, 0.0, 0.0, 0.0, 0.49, 0.49), (0.2, 0.6), (0.1, 0.5), (0.2, 0.4), said=False)  # what is asked is
# learned sooner where most of the sound is questions


class Turn(NamedTuple):
    """`asked` in seconds."""

    kind: Kind
    question: str
    answer: str
    expect: str
    asked: tuple[float, float]
    talker: str
    interrupted: bool


@dataclass(frozen=True, eq=False)
class Scene:
    """wave (2, n) float32 at 24 kHz: the model speaks, the model hears. `words` are the model's, as alignments, from
    when they are written to when they were said."""

    wave: np.ndarray
    words: list[tuple[str, tuple[float, float], str]]
    turns: list[Turn]


# ----------------------------------------------------------------------------------------- who asks what
def plan(script: Sequence[Line], count: int, random: np.random.Generator, pace: Pace = TALK) -> list[list[Line]]:
    """The questions of so many dialogues: all answers of a kind equally often, mostly one talker in a dialogue. A
    longer plan begins with a shorter one."""
    asked: dict[Kind, dict[str, list[Line]]] = {kind: {} for kind in KINDS}
    for line in script:
        if line.question:
            asked[line.question.kind].setdefault(line.question.answer, []).append(line)
    kinds = [kind for kind in KINDS if asked[kind]]
    shares = np.array([SHARES[KINDS.index(kind)] for kind in kinds])
    decks = {kind: deck(list(asked[kind]), random) for kind in kinds}
    scenes = []
    for _ in range(count):
        scene: list[Line] = []
        for _ in range(random.choice(len(pace.turns), p=pace.turns)):
            kind = kinds[random.choice(len(kinds), p=shares / shares.sum())]
            scene.append(chosen(asked[kind][next(decks[kind])], scene[-1].talker if scene else None, random))
        scenes.append(scene)
    return scenes


def deck(cards: list[str], random: np.random.Generator) -> Iterator[str]:
    while True:
        yield from (cards[i] for i in random.permutation(len(cards)))


def chosen(lines: list[Line], talker: str | None, random: np.random.Generator) -> Line:
    """One of the lines that ask the same: at times a person's, else the talker's who spoke before if there is one."""
    people = [line for line in lines if line.talker in PEOPLE + PEOPLE_HELD_OUT]
    voices = [line for line in lines if line.talker not in PEOPLE + PEOPLE_HELD_OUT]
    some = people if people and (not voices or random.random() < HUMAN) else voices
    same = [line for line in some if line.talker == talker]
    return (same or some)[random.integers(len(same or some))]


# ----------------------------------------------------------------------------------------- when
@dataclass(frozen=True, eq=False)
class Library:
    """`waves` (n,) int16 by `Line.file`, `answers` (n,) float32 and the `times` of their words by text, `noise`."""

    waves: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]
    times: dict[str, Times]
    noise: list[np.ndarray]


def compose(lines: Sequence[Line], library: Library, random: np.random.Generator, pace: Pace = TALK) -> Scene:
    stage = Stage(library, random, pace)
    stage.open(len(lines))
    for index, line in enumerate(lines, 1):
        stage.ask(line, more=index < len(lines))
    return stage.close(quiet=not lines)


@dataclass(eq=False)
class Stage:
    """A dialogue that is being composed; `at` is the sample at which the next question begins."""

    library: Library
    random: np.random.Generator
    pace: Pace
    at: int = 0
    asked: list[tuple[int, np.ndarray]] = field(default_factory=list)
    said: list[tuple[int, np.ndarray]] = field(default_factory=list)
    words: list[tuple[str, tuple[float, float], str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stretch: dict[str, float] = field(default_factory=dict)  # of each talker

    def samples(self, seconds: tuple[float, float]) -> int:
        return int(self.random.uniform(*seconds) * RATE)

    def open(self, questions: int) -> None:
        self.at = self.samples(LONG if questions == 1 and self.random.random() < 0.4 else self.pace.opening)

    def ask(self, line: Line, more: bool) -> None:
        """Places a question and its answer, which the next question interrupts at times."""
        question, wave, start = line.question, self.spoken(line), self.at
        end = start + len(wave) - AFTER * BLOCK
        reply = -(-(end + round(DELAY * RATE)) // FRAME) * FRAME
        answer = self.library.answers[question.answer] if self.pace.said else np.zeros(UNSAID, np.float32)
        interrupted = more and self.random.random() < INTERRUPTED
        if interrupted:
            self.at = reply + int(self.random.uniform(0.15 * len(answer), len(answer) - 0.4 * RATE))
            answer = cut(answer, self.at + self.samples(STOPPING) - reply)
        else:
            self.at = reply + len(answer) + self.samples(self.pace.gap)
        self.asked.append((start, wave))
        self.said.append((reply, answer))
        self.align(question.answer, reply, len(answer))
        spoken = (round(start / RATE + BEFORE * BLOCK / RATE, 3), round(end / RATE, 3))
        self.turns.append(Turn(question.kind, question.text, question.answer, question.expect, spoken, line.talker,
                               interrupted))

    def align(self, text: str, reply: int, length: int) -> None:
        """The words of an answer, also those that are not said where it is broken off after so many samples."""
        for index, (word, _, end) in enumerate(self.library.times[text]):
            written = (index * FRAME - AHEAD) / RATE
            said = max(min(end, length / RATE), written)
            self.words.append((word, (round(reply / RATE + written, 3), round(reply / RATE + said, 3)), MAIN))

    def spoken(self, line: Line) -> np.ndarray:
        """A question as its talker says it in this dialogue."""
        if line.talker not in self.stretch:
            self.stretch[line.talker] = self.random.uniform(*STRETCH)
        wave = stretched(self.library.waves[line.file], self.stretch[line.talker])
        if self.random.random() < HESITANT:
            wave = paused(wave, self.samples(PAUSE))
        return wave

    def close(self, quiet: bool) -> Scene:
        last = self.said[-1][0] + len(self.said[-1][1]) if self.said else 0
        size = -(-(last + self.samples(QUIET if quiet else self.pace.closing)) // FRAME) * FRAME
        own, dry = laid(self.said, size), laid(self.asked, size)
        return Scene(np.stack([own, heard(dry, own, self.library.noise, self.random)]), self.words, self.turns)


# ----------------------------------------------------------------------------------------- sound
def laid(parts: list[tuple[int, np.ndarray]], size: int) -> np.ndarray:
    wave = np.zeros(size, np.float32)
    for start, part in parts:
        wave[start:start + len(part)] += part
    return wave


def cut(wave: np.ndarray, size: int) -> np.ndarray:
    """The first samples, faded out."""
    out, fade = wave[:size].copy(), min(int(FADE * RATE), size)
    out[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return out


def stretched(wave: np.ndarray, factor: float) -> np.ndarray:
    """(n,) int16 -> (n * factor,) float32, slower and lower for a factor above 1."""
    places = np.arange(int(len(wave) * factor)) / factor
    return np.interp(places, np.arange(len(wave)), wave).astype(np.float32) / 32768


def paused(wave: np.ndarray, samples: int) -> np.ndarray:
    """Silent for so long at the quietest place of its middle."""
    power = powers(wave)
    first, last = int(0.35 * len(power)), max(int(0.75 * len(power)), int(0.35 * len(power)) + 1)
    place = (first + int(np.argmin(power[first:last]))) * BLOCK + BLOCK // 2
    return np.concatenate([wave[:place], np.zeros(samples, np.float32), wave[place:]])
