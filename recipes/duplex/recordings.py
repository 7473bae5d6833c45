"""Recorded dialogues: what both sides said, what was asked when, and what the answer was to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint.files import read_json
from mm.errors import InputError

from ...codecs.sound import Sound, open_sound
from ..data.dialogues import Entry
from ..data.words import read_words
from .asked import KINDS, Kind

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
