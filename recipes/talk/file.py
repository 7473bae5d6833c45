"""A conversation without a microphone: a sound file is heard, and what the model says meanwhile is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mm.decode.requests import TextStream

from ...codecs.sound import new_sound, open_sound
from ...codecs.state import Framer
from ..common.progress import Bar
from .dialogues import Dialogues
from .partner import Partner


def answer(partner: Partner, question: Path, to: Path, *, after: float, seed: int) -> None:
    """Writes a sound as long as the question and `--after` seconds of silence, in time with it; prints the text.
    Raises InputError."""
    sound = open_sound(question)
    steps = round((sound.seconds + after) / partner.seconds)
    words, s = TextStream(partner.model.tokenizer), partner.model.spec.text
    dialogues, samples = Dialogues(partner, 1), 0
    plain = partner.wishes
    wishes = replace(plain, text=replace(plain.text, seed=seed), audio=replace(plain.audio, seed=seed))
    dialogues.enter("file", wishes)
    with new_sound(to, partner.rate, 1) as file, Bar("answering", steps) as bar:
        for frame in frames(partner, sound.blocks(partner.rate, 1), after):
            said = dialogues.step({"file": frame})["file"]
            bar.step()
            if said is None:
                continue
            file.write(said.wave.clip(-1, 1))
            samples += len(said.wave)
            if said.token not in (s.padding, s.word_end):
                words.push(said.token)
    words.flush()
    print(words.text.strip())
    print(f"{to}: {samples / partner.rate:.1f} s, the first {sound.seconds:.1f} s of them beside the question")


def frames(partner: Partner, blocks: Iterator[Tensor], after: float) -> Iterator[np.ndarray]:
    """(frame,) each: one of silence, whose place is before the first that a model hears, the sound, and silence."""
    framer, silence = Framer.empty(1, 1, partner.frame), round(after * partner.rate / partner.frame)
    yield np.zeros(partner.frame, np.float32)
    for block in blocks:
        for piece in framer.push(block[None]).split(partner.frame, 2):
            if piece.shape[2]:
                yield piece[0, 0].numpy()
    for piece in (framer.flush(), torch.zeros(1, 1, partner.frame * silence)):
        yield from (one[0, 0].numpy() for one in piece.split(partner.frame, 2) if one.shape[2])
