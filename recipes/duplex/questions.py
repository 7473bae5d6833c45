"""Questions that a person asks the shipped duplex model: their texts and answers, whether a transcript answers one, and
recorded dialogues with the times of their questions.

The words to repeat are 50 of the 300 that the Modified Rhyme Test reads aloud in "Please select the word X." (House et
al., 1965), so that recordings of people saying them exist: such as a recogniser tells from the other words of the test
when the model's voice says them through the codec.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint.files import read_json
from mm.errors import InputError

from ...codecs.sound import Sound, open_sound
from ..data.dialogues import Entry
from ..data.words import read_words

Kind = Literal["sum", "word", "greeting"]
KINDS: tuple[Kind, ...] = ("sum", "word", "greeting")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
DIGITS = range(10)
IS = ("is", "equals", "are", "makes")
LARGER = ("nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred")
# word: its list and place there in the Modified Rhyme Test
WORDS = {
    "tent": (1, 5), "sold": (2, 5), "path": (3, 4), "late": (4, 3), "hit": (5, 4), "dust": (6, 5), "teach": (7, 4),
    "dim": (8, 3), "fed": (9, 3), "went": (1, 1), "duck": (11, 3), "sub": (12, 5), "seed": (13, 6), "hot": (14, 5),
    "nest": (15, 6), "pick": (16, 6), "back": (17, 1), "day": (18, 5), "big": (19, 2), "page": (20, 3), "cave": (21, 6),
    "shop": (22, 1), "boil": (23, 5), "tap": (24, 3), "just": (6, 6), "game": (26, 3), "feel": (27, 3), "dark": (28, 2),
    "heap": (29, 5), "cup": (30, 1), "team": (7, 2), "hen": (32, 2), "puff": (33, 1), "beach": (34, 2), "seat": (35, 4),
    "lip": (36, 5), "king": (37, 5), "bang": (38, 3), "way": (18, 1), "map": (40, 3), "race": (41, 6), "sale": (42, 3),
    "name": (26, 2), "sing": (44, 4), "male": (45, 6), "man": (40, 5), "peak": (47, 3), "bus": (48, 2), "sad": (49, 5),
    "run": (50, 5),
}
GREETINGS = ("Hello.", "Hi there.", "Good morning.", "Hey.", "Good evening.", "Hello there.")
SUM = ("What is {} plus {}?", "What's {} and {}?", "{} plus {}.", "How much is {} plus {}?", "Add {} and {}.",
       "Can you add {} and {}?")
WORD = ("Repeat the word {}.", "Say the word {}.", "Please select the word {}.")
READ = WORD[2]  # as the talkers of the Modified Rhyme Test say it

# How else a listener may spell what sounds the same
SPELLED = {"won": "one", "to": "two", "too": "two", "for": "four", "ate": "eight", "peek": "peak", "pique": "peak",
           "buss": "bus", "beech": "beach", "mail": "male", "sail": "sale", "weigh": "way", "teem": "team"}


@dataclass(frozen=True)
class Question:
    """`expect` is the key word of the answer."""

    kind: Kind
    text: str
    answer: str
    expect: str


def sum_of(a: int, b: int, phrasing: str) -> Question:
    """The answer says the sum again, so that what was heard is known before what it comes to."""
    total = NUMBERS[a + b]
    return Question("sum", sentence(phrasing.format(NUMBERS[a], NUMBERS[b])),
                    sentence(f"{NUMBERS[a]} plus {NUMBERS[b]} is {total}."), total)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def repeat(word: str, phrasing: str) -> Question:
    return Question("word", phrasing.format(word), f"The word is {word}.", word)


def greet(text: str) -> Question:
    return Question("greeting", text, "Hello, how can I help you?", "hello")


def answers() -> list[str]:
    """Every sentence that the model says, once."""
    questions = [sum_of(a, b, SUM[0]) for a in DIGITS for b in DIGITS] + [repeat(word, READ) for word in WORDS]
    return [one.answer for one in (*questions, greet(GREETINGS[0]))]


# ----------------------------------------------------------------------------------------- the judge
def correct(kind: Kind, expect: str, transcript: str) -> bool:
    """Whether a transcript, such as Whisper's, holds the key word and no other one: of a sum, what is said to be the
    result, and no other number."""
    heard = plain(transcript)
    if kind == "greeting":
        return bool({"hello", "hi", "help"} & set(heard))
    keys = (NUMBERS, LARGER) if kind == "sum" else (WORDS,)
    if kind == "sum":
        heard = heard[max((i + 1 for i, word in enumerate(heard) if word in IS), default=0):]
    return {word for word in heard if word.isdecimal() or any(word in known for known in keys)} == {expect}


def plain(transcript: str) -> list[str]:
    """Lower-case words, without punctuation, digits up to 18 written out, spellings by sound made one."""
    words = re.findall(r"[a-z]+|\d+", transcript.lower().replace("'", "").replace("=", " is "))
    return [NUMBERS[int(word)] if word.isdecimal() and int(word) < len(NUMBERS) else SPELLED.get(word, word)
            for word in words]


LEFT, RIGHT = 0, 1  # who answers, who asks
AFTER = 1.0  # seconds of silence at the end, for an answer that is late


@dataclass(frozen=True)
class Turn:
    """A question, from `start` to `end`, and the answer that follows it before `until`, where the next question begins;
    the recorded one ends at `answered`. All in seconds. `expect` is what `asked.correct` takes. An `interrupted` answer
    is one that the person breaks off."""

    kind: Kind
    expect: str
    start: float
    end: float
    until: float
    answered: float
    interrupted: bool


@dataclass(frozen=True)
class Recording:
    sound: Sound
    turns: list[Turn]

    def voice(self, rate: int, channel: int) -> Tensor:
        """(L,) of one side, with `AFTER` seconds of silence."""
        wave = torch.cat([block[channel] for block in self.sound.blocks(rate, 2)])
        return F.pad(wave, (0, round(AFTER * rate)))

    def heard(self, other: Recording, rate: int) -> Tensor:
        """(L,) of the person of another dialogue, for as long as this one goes on."""
        wave = other.voice(rate, RIGHT)
        return wave if other is self else F.pad(wave, (0, round((self.sound.seconds + AFTER) * rate) - len(wave)))


def recording(entry: Entry) -> Recording:
    """Raises InputError for an entry without a sound of two channels, or without turns."""
    if entry.sound is None:
        raise InputError(f"{entry.where} names codes: dialogues are judged from a sound file, under path")
    sound = open_sound(entry.sound)
    if sound.channels != 2:
        raise InputError(f"{entry.sound} has {sound.channels} channel, a dialogue has two: left answers, right asks")
    return Recording(sound, read_turns(entry.words))


def read_turns(path: Path) -> list[Turn]:
    """The list `turns` of a file of alignments, in order; a dialogue may have none. Raises InputError that names the
    file and the entry."""
    listed = read_json(path).get("turns")
    if not isinstance(listed, list):
        raise InputError(f"{path} has no list turns: it does not say what was asked")
    asked = [to_asked(path, number, entry) for number, entry in enumerate(listed)]
    begins = [start for _, _, (start, _), _ in asked]
    if begins != sorted(begins):
        raise InputError(f"{path}: turns are out of order")
    words, turns = read_words(path), []
    for (kind, expect, (start, end), interrupted), until in zip(asked, [*begins, math.inf][1:], strict=True):
        said = [word.end for word in words if end <= word.start < until]
        turns.append(Turn(kind, expect, start, end, until, max(said, default=end), interrupted))
    return turns


def to_asked(path: Path, number: int, entry: Any) -> tuple[Kind, str, tuple[float, float], bool]:
    try:
        kind, expect, (start, end) = entry["kind"], str(entry["expect"]), map(float, entry["asked"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: turn {number} should hold kind, expect and asked [start, end], not {entry!r:.60}"
                         ) from None
    if kind not in KINDS:
        raise InputError(f"{path}: turn {number} is of the kind {kind!r}, expected {' or '.join(KINDS)}")
    if not 0 <= start <= end < math.inf:
        raise InputError(f"{path}: turn {number} is asked from {start} to {end} s")
    return kind, expect, (start, end), bool(entry.get("interrupted"))
