"""Utterances read from their folder, and dialogues written to theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mm.checkpoint.files import read_json, replacing
from mm.errors import InputError

from ..data.sampler import generator
from ..duplex.questions import answers
from .acoustics import noises
from .scenes import DRILL, TALK, Library, Scene, compose
from .talkers import HELD_OUT, OWN, Line
from .voices import RATE

TIMES = f"{OWN}/words.json"
PARTS = {"train": TALK, "val": TALK, "drill": DRILL}
SCENES, NOISES = 41, 43  # the last number of the keys of random generators

Piece = tuple[str, int, list[Line]]  # a part, the number of a dialogue in it, its questions


def read_library(folder: Path, script: Sequence[Line], seed: int) -> Library:
    """Raises InputError that names a file which is missing or broken."""
    waves = {line.file: read_utterance(folder / line.file) for line in script}
    own = {line.text: waves.pop(line.file).astype(np.float32) / 32768 for line in script if line.talker == OWN}
    speech = [waves[line.file] for line in script if line.talker not in HELD_OUT and line.talker != OWN]
    return Library(waves, own, read_json(folder / TIMES), noises(speech, generator(seed, NOISES)))


def read_utterance(path: Path) -> np.ndarray:
    import soundfile

    try:
        return soundfile.read(path, dtype="int16")[0]
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{path} cannot be read, delete it and it will be made again ({error})") from None


def times_known(folder: Path) -> bool:
    """Whether the times of the words of all answers are in the folder."""
    path = folder / TIMES
    return path.exists() and set(read_json(path)) == set(answers())


# ----------------------------------------------------------------------------------------- dialogues
def composing(out: Path, folder: Path, script: Sequence[Line], seed: int) -> Callable[[Piece], Piece]:
    """Writes OUT/PART/NUMBER.flac and .json."""
    library = read_library(folder, script, seed)

    def one(piece: Piece) -> Piece:
        part, number, questions = piece
        random = generator(seed, list(PARTS).index(part), number, SCENES)
        scene = compose(questions, library, random, PARTS[part])
        write_scene(out / path_of(part, number), scene)
        return piece

    return one


def path_of(part: str, number: int) -> str:
    return f"{part}/{number:06d}.flac"


def write_scene(path: Path, scene: Scene) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"alignments": scene.words, "turns": [one._asdict() for one in scene.turns]}
    with replacing(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(told) + "\n", "utf-8")
    with replacing(path) as part:
        soundfile.write(part, scene.wave.T, RATE, format="FLAC", subtype="PCM_16")
