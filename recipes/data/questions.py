"""What was asked in a recorded dialogue, when, and what its answer was to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.checkpoint import read_json
from mm.errors import InputError

from .asked import KINDS, Kind
from .words import read_words


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
