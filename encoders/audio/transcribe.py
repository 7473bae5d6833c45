"""Sounds of any length to text with times, 30 seconds at a time (Radford et al., 2022, section 3.8)."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError

from .spectrogram import FRAMES_PER_SECOND, RATE, Sound, open_ended, read_sound
from .speech_tokens import SECONDS, SpeechTokens
from .whisper import Whisper

FIRST = 1.0  # seconds; the first time of a transcript is at most this late in its window


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


@dataclass(frozen=True)
class Window:
    """What one window is decoded from: what the encoder heard (S, D), the ids of the text before it, the tokens that
    begin a transcript, a temperature."""

    heard: Tensor
    prompt: list[int]
    begin: list[int]
    temperature: float = 0.0


@dataclass(frozen=True)
class Heard:
    """What one window gave: ids of text and times, the mean log probability of each, the probability of no speech, the
    ratio by which zlib shortens the text."""

    tokens: list[int]
    logprob: float
    no_speech: float
    compression: float
    temperature: float


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


# ------------------------------------------------------------------------------------- one batch of windows
class Rules:
    """Which tokens may follow (Radford et al., 2022): no special tokens or marks of what is not said, no blank at the
    start, times in pairs that do not fall."""

    def __init__(self, model: Whisper, tokens: SpeechTokens, device: torch.device):
        self.tokens, vocab = tokens, model.spec.decoder.embed.vocab
        self.silent = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.silent[tokens.silent(model.tokenizer) + [tokens.no_times]] = True
        self.first = self.silent.clone()
        self.first[: tokens.times] = True
        self.first[tokens.times + round(FIRST * model.spec.frames / 30) + 1 :] = True

    def __call__(self, logits: Tensor, said: Tensor) -> Tensor:
        """logits (B, V) in float32, written over with the log probabilities of what may follow `said` (B, N)."""
        if not said.shape[1]:
            return torch.log_softmax(logits.masked_fill_(self.first, -torch.inf), -1)
        logits.masked_fill_(self.silent, -torch.inf)
        times, end = self.tokens.times, self.tokens.end
        last = said[:, -1:] >= times
        before = said[:, -2:-1] >= times if said.shape[1] > 1 else torch.ones_like(last)
        latest = torch.where(said >= times, torch.arange(said.shape[1], device=said.device), -1).amax(1, keepdim=True)
        latest = torch.where(latest < 0, times, said.gather(1, latest.clamp(min=0)) + ~(last & ~before))
        mark = torch.arange(times, logits.shape[1], device=said.device)
        logits[:, times:].masked_fill_((mark < latest) | (last & before), -torch.inf)
        logits[:, :end].masked_fill_(last & ~before, -torch.inf)
        odds = torch.log_softmax(logits, -1)
        timed = odds[:, times:].logsumexp(-1, keepdim=True)
        only = timed > odds[:, :times].amax(-1, keepdim=True)  # together likelier than any word
        odds[:, :times].masked_fill_(only, -torch.inf)
        return torch.where(only, odds - timed, odds)


@torch.inference_mode()
def decode(model: Whisper, windows: Sequence[Window], rules: Rules, generator: torch.Generator | None = None
           ) -> list[Heard]:
    """One batch of windows, greedily or sampled by each one's temperature."""
    tokens, context = rules.tokens, model.spec.decoder.context
    memory = model.decoder.stack.remember(torch.stack([window.heard for window in windows]))
    rows = [[*([tokens.previous, *window.prompt[-(context // 2 - 1):]] if window.prompt else []),
             *window.begin] for window in windows]
    ids, mask = padded_left(rows, tokens.end, memory.at.position.device)
    state = model.decoder.init_state(len(rows), length=ids.shape[1] + context // 2)
    hidden = model.decoder.hidden(ids, memory=memory, mask=mask, state=state, within=ids.shape[1])
    silence = model.decoder.logits(hidden[:, -len(windows[0].begin)]).float().softmax(-1)[:, tokens.no_speech].tolist()
    said = ids[:, :0]
    total = torch.zeros(len(rows), device=ids.device)
    heat = torch.tensor([[window.temperature] for window in windows], device=ids.device)
    sampled = any(window.temperature for window in windows)
    done = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    for _ in range(context // 2):
        odds = rules(model.decoder.logits(hidden[:, -1]).float(), said)
        following = pick(odds, heat, generator) if sampled else odds.argmax(-1, keepdim=True)
        following = following.masked_fill(done[:, None], tokens.end)
        total += odds.gather(1, following)[:, 0].masked_fill(done, 0.0)
        said = torch.cat([said, following], 1)
        done = done | (following[:, 0] == tokens.end)
        if bool(done.all()) or max(map(len, rows)) + said.shape[1] > context:
            break
        hidden = model.decoder.hidden(following, memory=memory, state=state, within=ids.shape[1] + said.shape[1])
    return [summed(model, row, *rest) for row, *rest in
            zip(said.tolist(), total.tolist(), silence, (window.temperature for window in windows), strict=True)]


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """ids (B, T), mask (B, T) bool, None where all are equally long."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)


def pick(odds: Tensor, heat: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id (B, 1) a row: the likeliest, or by chance where it has heat."""
    noise = -torch.empty_like(odds).exponential_(generator=generator).log()  # Gumbel
    return torch.where(heat > 0, odds + heat * noise, odds).argmax(-1, keepdim=True)


def summed(model: Whisper, said: list[int], total: float, no_speech: float, temperature: float) -> Heard:
    end = SpeechTokens(model.spec.decoder.embed.vocab).end
    said = said[: said.index(end)] if end in said else said
    text = words(model, said).strip().encode()
    return Heard(said, total / (len(said) + 1), no_speech, len(text) / len(zlib.compress(text)), temperature)


def words(model: Whisper, ids: Sequence[int]) -> str:
    """The text of ids without times and special tokens."""
    end = SpeechTokens(model.spec.decoder.embed.vocab).end
    return model.tokenizer.pieces.decode([i for i in ids if i < end])
