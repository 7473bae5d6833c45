"""Words and when they were said -> a stream of one token a frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mm.checkpoint.files import read_json
from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

MAIN = "SPEAKER_MAIN"


@dataclass(frozen=True)
class Word:
    """start and end in seconds."""

    text: str
    start: float
    end: float


def read_words(path: Path, speaker: str = MAIN) -> list[Word]:
    """The words of one speaker, in order, from a file of alignments. Raises InputError that names the file and the
    entry which is out of order or no word."""
    listed = read_json(path).get("alignments")
    if not isinstance(listed, list):
        raise InputError(f"{path} has no list alignments")
    words: list[Word] = []
    for number, entry in enumerate(listed):
        word, who = to_word(path, number, entry)
        if who != speaker:
            continue
        if words and word.start < words[-1].start:
            raise InputError(f"{path}: alignments are out of order: number {number} begins at {word.start} s, before "
                             f"{words[-1].start} s")
        words.append(word)
    return words


def speakers(path: Path) -> set[str]:
    """Who speaks in a file of alignments."""
    return {to_word(path, number, entry)[1] for number, entry in enumerate(read_json(path)["alignments"])}


def to_word(path: Path, number: int, entry: Any) -> tuple[Word, str]:
    try:
        text, (start, end), who = entry
        word = Word(str(text), float(start), float(end))
    except (TypeError, ValueError):
        raise InputError(f"{path}: alignment {number} should be [word, [start, end], speaker], not {entry!r:.60}"
                         ) from None
    if not 0 <= word.start <= word.end < math.inf:
        raise InputError(f"{path}: alignment {number} runs from {start} to {end} s")
    return word, str(who)


def by_word(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """word -> tokens, such that words one after the other read as a text with spaces between them."""
    joined = tokenizer.decode([*tokenizer.encode("one"), *tokenizer.encode("two")])
    return tokenizer.encode if " " in joined.strip() else lambda word: tokenizer.encode(f" {word}")


def text_stream(words: Iterable[Word], frames: int, rate: float, encode: Callable[[str], list[int]], *, padding: int,
                word_end: int, late: Literal["drop", "shift"] = "drop") -> np.ndarray:
    """(frames,) int64. A word's first token stands in the frame in which it starts, `rate` frames a second, the others
    follow one a frame, and `word_end` stands before it where there was padding. A word that begins while the one before
    is still written cuts that off, or with `late` shifts waits for it. What begins after the last frame is left out."""
    stream, free = np.full(frames, padding, np.int64), 0
    for word in words:
        start = math.floor(word.start * rate)
        start = max(start, free) if late == "shift" else start
        tokens = encode(word.text.strip())
        if start >= frames or not tokens:
            continue
        if start and stream[start - 1] == padding:
            stream[start - 1] = word_end
        stream[start:] = padding  # what is left of the word before
        stop = min(start + len(tokens), frames)
        stream[start:stop] = tokens[:stop - start]
        free = stop
    return stream
