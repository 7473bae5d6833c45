"""Sounds of any length to text with times, 30 seconds at a time (Radford et al., 2022, section 3.8)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError

from .dictation import Heard, Rules, Window, decode, words
from .logmel import FRAMES_PER_SECOND, RATE, open_ended
from .spectrogram import Sound, read_sound
from .speech_tokens import SECONDS, SpeechTokens
from .whisper import Whisper


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`temperatures` are tried in turn until a window's text is neither repetitive (`compression`) nor unlikely
    (`logprob`); a window without speech (`no_speech`) and unlikely text is skipped. `carry`: what was said before is
    the next window's prompt. `language` None is English, or heard where the model knows several."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression: float = 2.4
    logprob: float = -1.0
    no_speech: float = 0.6
    carry: bool = True
    language: str | None = None
    task: str = "transcribe"
    seed: int = 0


@dataclass(frozen=True)
class Segment:
    """`start` and `end` in seconds."""

    start: float
    end: float
    text: str
    tokens: list[int]
    logprob: float
    no_speech: float
    compression: float
    temperature: float


@dataclass(frozen=True)
class Transcript:
    text: str
    segments: list[Segment]
    language: str


Session = Generator[Window | Tensor, Heard | Tensor, Transcript]


@torch.inference_mode()
def transcribe(model: Whisper, sounds: Sequence[Sound], settings: Settings = Settings(), batch: int = 8  # noqa: B008
               ) -> list[Transcript]:
    """Each sound's transcript; windows of up to `batch` sounds are decoded side by side. Raises InputError for what is
    no sound, for a model without a tokenizer and for a language that it does not know."""
    tokens = SpeechTokens(model.spec.decoder.embed.vocab)
    if model.tokenizer is None or not tokens.ready:
        raise InputError("the model has no tokenizer of Whisper: a folder needs tokenizer.json, a multilingual .pt "
                         "file needs multilingual.tiktoken beside it")
    tokens.begin(settings.language, settings.task)
    device = model.decoder.embed.tokens.weight.device
    rules, generator = Rules(model, tokens, device), torch.Generator(device).manual_seed(settings.seed)
    out: list[Transcript | None] = [None] * len(sounds)
    waiting = list(range(len(sounds)))[::-1]
    running: dict[int, tuple[Session, Window | Tensor]] = {}
    while waiting or running:
        while waiting and len(running) < batch:
            i = waiting.pop()
            start(i, session(model, sounds[i], settings, tokens), None, running, out)
        answers = answered(model, {i: asked for i, (_, asked) in running.items()}, rules, generator)
        for i, answer in answers.items():
            start(i, running.pop(i)[0], answer, running, out)
    return out


def start(i: int, one: Session, answer: Heard | Tensor | None, running: dict, out: list) -> None:
    """Let a session go on until it asks again or ends."""
    try:
        running[i] = one, one.send(answer)
    except StopIteration as stop:
        out[i] = stop.value


def answered(model: Whisper, asked: dict[int, Window | Tensor], rules: Rules, generator: torch.Generator
             ) -> dict[int, Heard | Tensor]:
    """Spectrograms are encoded one by one, which is as fast as together; windows are decoded in one batch."""
    out = {i: model.encoder(mel[None])[0] for i, mel in asked.items() if isinstance(mel, Tensor)}
    windows = {i: window for i, window in asked.items() if isinstance(window, Window)}
    if windows:
        out |= zip(windows, decode(model, list(windows.values()), rules, generator), strict=True)
    return out


# ------------------------------------------------------------------------------------- one sound
def session(model: Whisper, sound: Sound, settings: Settings, tokens: SpeechTokens) -> Session:
    """Asks for the encoder's output of spectrograms and for the text of windows, and returns the transcript."""
    window, stride = 2 * model.spec.frames, 2  # frames of the spectrogram
    wave = read_sound(sound, RATE)
    mel = open_ended(wave, model.spec.mels).to(model.encoder.positions)
    total, seek = len(wave) * FRAMES_PER_SECOND // RATE, 0
    language = settings.language or "en"
    if tokens.multilingual and settings.language is None:
        opening = F.pad(mel[:, :window], (0, max(0, window - mel.shape[1])), value=float(mel.min()))
        language = listen(model, (yield opening), tokens)
    begin = tokens.begin(language, settings.task)
    segments: list[Segment] = []
    said: list[int] = []
    forgotten = 0
    while seek < total:
        size = min(window, total - seek)
        heard = yield F.pad(mel[:, seek : seek + size], (0, window - size))
        result = yield from tried(heard, said[forgotten:], begin, settings)
        if result.no_speech > settings.no_speech and result.logprob <= settings.logprob:
            seek += size
            continue
        new, moved = cut(model, result, seek / FRAMES_PER_SECOND, size, stride, tokens)
        segments += new
        said += [token for segment in new for token in segment.tokens]
        seek += moved
        if not settings.carry or result.temperature > 0.5:
            forgotten = len(said)
    return Transcript(words(model, said), segments, language)


def tried(heard: Tensor, prompt: list[int], begin: list[int], settings: Settings
          ) -> Generator[Window, Heard, Heard]:
    """The text of one window at the first temperature that gives a good one, or at the last."""
    for temperature in settings.temperatures:
        result = yield Window(heard, prompt, begin, temperature)
        doubtful = result.logprob < settings.logprob
        if doubtful and result.no_speech > settings.no_speech:
            break
        if not doubtful and result.compression <= settings.compression:
            break
    return result


def cut(model: Whisper, result: Heard, start: float, size: int, stride: int, tokens: SpeechTokens
        ) -> tuple[list[Segment], int]:
    """A window's text in segments between its times, and by how many frames to move on: to the last time that ends a
    segment, or past the window where nothing is left open."""
    ids = result.tokens
    timed = [i >= tokens.times for i in ids]
    closed = timed[-2:] == [False, True]
    cuts = [i for i in range(1, len(ids)) if timed[i - 1] and timed[i]]

    def segment(first: float, last: float, part: list[int]) -> Segment:
        text = words(model, part)
        kept = part if text.strip() and first != last else []
        return Segment(start + first, start + last, text if kept else "", kept, result.logprob, result.no_speech,
                       result.compression, result.temperature)
    if not cuts:
        marks = [i for i, is_time in zip(ids, timed, strict=True) if is_time]
        length = (marks[-1] - tokens.times) * SECONDS if marks and marks[-1] != tokens.times else \
            size / FRAMES_PER_SECOND
        return [segment(0.0, length, ids)], size
    cuts += [len(ids)] if closed else []
    parts = [ids[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    made = [segment((part[0] - tokens.times) * SECONDS, (part[-1] - tokens.times) * SECONDS, part) for part in parts]
    return made, size if closed else (parts[-1][-1] - tokens.times) * stride


def listen(model: Whisper, heard: Tensor, tokens: SpeechTokens) -> str:
    """The language of a window."""
    hidden = model.decoder.hidden(torch.tensor([[tokens.start]], device=heard.device), memory=heard[None])
    first = tokens.start + 1
    odds = model.decoder.logits(hidden[0, -1])[first : first + len(tokens.languages)]
    return tokens.languages[int(odds.argmax())]

