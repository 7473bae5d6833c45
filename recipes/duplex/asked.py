"""What a person asks of the shipped duplex model, what it answers, and whether an answer that was heard is right.

The words to repeat are 50 of the 300 that the Modified Rhyme Test reads aloud in "Please select the word X." (House et
al., 1965), so that recordings of people saying them exist: such as a recogniser tells from the other words of the test
when the model's voice says them through the codec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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
