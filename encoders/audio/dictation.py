"""Whisper's decoding of one window: which tokens may follow, and the loop over a batch of windows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .speech_tokens import SpeechTokens
from .whisper import Whisper

FIRST = 1.0  # seconds; a transcript's first time is at most this late in its window


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
