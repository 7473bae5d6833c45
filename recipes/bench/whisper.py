"""`mm bench whisper`: transcripts of clips against openai-whisper's with the same weights, greedy, float32 on a CPU,
and the word error rate of both."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from mm.errors import InputError

from ...encoders.audio.spectrogram import RATE, read_sound
from ...encoders.audio.transcribe import Settings, transcribe
from ..commands.transcribe import load
from ..common.command import argument
from ..common.metrics import word_error_rate
from .report import Bench, Case, interleave, report

PACKAGES = ("torch", "openai-whisper")
GREEDY = Settings(temperatures=(0.0,))


@dataclass(frozen=True, kw_only=True)
class Whisper(Bench):
    """Transcripts of clips against openai-whisper's with the same weights, greedy, float32 on a CPU, and the word
    error rate of both.

    Args:
        folder: LJ Speech: metadata.csv and wavs/, any format.
        model: OpenAI's .pt file.
        clips: how many.
        threads: CPU threads.
        repeats: timed calls of each.
    """

    folder: Path = argument()
    model: str | None = None
    clips: PositiveInt = 8
    threads: PositiveInt = 1
    repeats: PositiveInt = 5

    def run(self) -> int:
        return whisper(self)


def whisper(args: Whisper) -> int:
    torch.set_num_threads(args.threads)
    return report("whisper", measure(args), packages=PACKAGES, json_file=args.json)


def measure(args: Whisper) -> list[Case]:
    import whisper as peer

    from ..commands.transcribe import installed

    path = args.model or installed()
    ours, theirs = load(str(path), "cpu"), peer.load_model(str(path), device="cpu")
    waves, texts = clips(args.folder, args.clips)

    def one_by_one() -> list[str]:
        return [transcribe(ours, [wave], GREEDY)[0].text for wave in waves]

    def reference() -> list[str]:
        return [peer.transcribe(theirs, wave, temperature=0.0, fp16=False)["text"] for wave in waves]

    def together() -> list[str]:
        return [one.text for one in transcribe(ours, waves, GREEDY)]
    heard, other = one_by_one(), reference()
    if heard != other:
        raise InputError("our text is not openai-whisper's, so that a timing would mean nothing")
    rates = word_error_rate(heard, texts), word_error_rate(other, texts)
    single, several = (interleave(call, reference, args.repeats) for call in (one_by_one, together))
    return [Case.timed(f"{len(waves)} clips, one by one", single),
            Case.timed(f"{len(waves)} clips, side by side", several, at_least=1.3),
            Case(case="word error rate", ours=rates[0], peer=rates[1], unit="%")]


def clips(folder: Path, count: int) -> tuple[list[Tensor], list[str]]:
    """Waves at 16 kHz and what was said. Raises InputError without metadata.csv."""
    try:
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))
    except OSError as error:
        raise InputError(f"{folder / 'metadata.csv'} cannot be read ({error.strerror})") from None
    texts = {row[0]: row[-1] for row in rows}
    paths = sorted(path for path in (folder / "wavs").glob("*.*") if path.stem in texts)[:count]
    if not paths:
        raise InputError(f"{folder / 'wavs'} holds no clip that metadata.csv names")
    return [read_sound(path, RATE) for path in paths], [texts[path.stem] for path in paths]
