"""When Hibari says each word: its network predicts how long each phoneme lasts, but does not tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import InputError

from .voices import BEFORE, BLOCK, RATE, loud

LASTING = "/Clip_output_0"  # in hibari.onnx of hibari-tts 0.2.1: how many steps each phoneme lasts
STEP = 0.025  # seconds
MARKS = ".,!?"

Times = list[tuple[str, float, float]]


def word_times(hibari: Any, texts: Iterable[str]) -> dict[str, Times]:
    """(word, start, end) of each sentence, in seconds of its utterance as `voices.keep` cuts it. `hibari` is a
    `hibari.Hibari`. Raises InputError where it has another network."""
    import onnxruntime

    model = telling(Path(hibari.model_path).read_bytes())
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class of its own for each cause
        raise InputError(f"{hibari.model_path} tells no times of words; mm wants hibari-tts 0.2.1 ({error})") from None
    found = {}
    for text in texts:
        phonemes = hibari.phonemize(text)[0]
        inputs = {"ids": np.array([hibari.ids(phonemes)]), "speed": np.ones(1, np.float32)}
        steps = session.run([LASTING], inputs)[0].reshape(-1)
        said = np.flatnonzero(loud(hibari(text, seed=0))) * BLOCK / RATE
        found[text] = placed(text, phonemes, steps * STEP, said[0] - BEFORE * BLOCK / RATE, said[-1] + BLOCK / RATE)
    return found


def telling(model: bytes) -> bytes:
    """The ONNX model with the durations among its outputs. Messages of protocol buffers that stand one after the other
    are merged: this appends a model whose graph (field 7) has an output (12) of that name (1) and nothing else."""
    message = LASTING.encode()
    for tag in (0x0A, 0x62, 0x3A):
        message = bytes([tag, len(message)]) + message
    return model + message


def placed(text: str, phonemes: str, lasting: np.ndarray, cut: float, end: float) -> Times:
    """Words after `cut` seconds are left out of what Hibari says, which ends at `end`. `lasting` (1 + phonemes + 1,)
    seconds, of the pause before, each character of `phonemes`, words apart by spaces, and the pause after."""
    cut = max(cut, 0.0)
    ends, at, times = np.cumsum(lasting), 1, []
    for word, part in zip(text.split(), phonemes.split(" "), strict=True):
        last = at + len(part.rstrip(MARKS)) - 1
        start, stop = max(ends[at - 1] - cut, 0.0), min(ends[last], end) - cut
        times.append((word, round(float(start), 3), round(float(stop), 3)))
        at += len(part) + 1
    return times
