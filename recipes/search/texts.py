"""The texts of a folder, in passages that a sentence encoder reads whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import InputError

from ..common import files
from ..common.files import FoundFile, Walk
from ..data.corpus import content

ENDINGS = (".txt", ".md", ".markdown", ".rst", ".jsonl")
LONGEST = 160  # tokens of a passage, or as many as the model reads
PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*\n?)+")  # lines up to an empty one
SENTENCE = re.compile(r"\S.*?(?:[.!?。！？][\"'”’)\]]*(?=\s|$)|(?<=[。！？])|$)", re.DOTALL)
WORD = re.compile(r"\S{1,200}")
HEADING = re.compile(r"#{1,6} ")


@dataclass(frozen=True)
class Passage:
    """Words, and the line of the file (from 1) on which they begin."""

    text: str
    line: int


def walk(folder: str | Path) -> Walk:
    """All texts under a folder: see `files.walk`."""
    def plain(file: Path, names: set[str], **about: Any) -> FoundFile:
        return FoundFile(**about)
    return files.walk(folder, "texts", ENDINGS, plain)


def passages(data: bytes, name: str, cost: Callable[[str], int], longest: int) -> list[Passage]:
    """A file in passages of at most `longest` by cost(text). Raises InputError that begins with the name for a file
    that is not UTF-8, holds no words, or is broken JSON lines."""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from None
    parts = records(text, name) if name.lower().endswith(".jsonl") else [(text, 1)]
    found = [passage for part, line in parts for passage in split(part, line, cost, longest)]
    if not found:
        raise InputError(f"{name}: the file holds no words")
    return found


def records(text: str, name: str) -> Iterator[tuple[str, int]]:
    """(text, line) of every row of JSON lines: a text, or the messages of a conversation."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            words, messages = content(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: line {number}: {error}") from None
        yield words or "\n\n".join(message["content"] for message in messages), number


def split(text: str, first: int, cost: Callable[[str], int], longest: int) -> Iterator[Passage]:
    """Paragraphs side by side while they fit; a heading begins a passage; what is too long is cut after sentences, or
    where there are none, words."""
    held: list[str] = []
    begin = used = 0
    for piece, start in pieces(text, cost, longest):
        size = cost(piece)
        if held and (used + size > longest or HEADING.match(piece)):
            yield Passage("\n\n".join(held), first + text.count("\n", 0, begin))
            held, used = [], 0
        if not held:
            begin = start
        held.append(piece)
        used += size
    if held:
        yield Passage("\n\n".join(held), first + text.count("\n", 0, begin))


def pieces(text: str, cost: Callable[[str], int], longest: int) -> Iterator[tuple[str, int]]:
    """(words, where they start) of every paragraph, those too long as several."""
    for found in PARAGRAPH.finditer(text):
        if cost(found[0]) <= longest:
            yield tidy(found[0]), found.start()
            continue
        held, begin, used = "", found.start(), 0
        for part, start in sentences(found[0], cost, longest):
            size = cost(part)
            if held and used + size > longest:
                yield tidy(held), begin
                held, used = "", 0
            begin = begin if held else found.start() + start
            held, used = f"{held} {part}", used + size
        if held:
            yield tidy(held), begin


def sentences(paragraph: str, cost: Callable[[str], int], longest: int) -> Iterator[tuple[str, int]]:
    """(words, where they start) of every sentence, those too long word by word."""
    for found in SENTENCE.finditer(paragraph):
        if cost(found[0]) <= longest:
            yield found[0], found.start()
        else:
            yield from ((word[0], found.start() + word.start()) for word in WORD.finditer(found[0]))


def tidy(text: str) -> str:
    """The words with single blanks, lines kept."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
