"""Sampling: the choice of the next token, by settings of each row, the same for a row alone or in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.spec.schema import require
from mm.tree import register

MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of one row. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave every token in; `stop` are
    strings that end the text (and are left out of it); `eos` False continues past the model's end token.

    Raises InputError where a setting is out of range or contradicts another.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    eos: bool = True

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer, not {value!r}")
        require(self.max_tokens > 0, f"max_tokens must be at least 1, not {self.max_tokens}")
        require(0 <= self.temperature < float("inf"), f"temperature must be 0 (greedy) or more, not {self.temperature}")
        require(self.top_k >= 0, f"top_k must be 0 (every token) or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(0 <= self.min_p < 1, f"min_p must lie in [0, 1), not {self.min_p}")
        require(0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty must be positive, not {self.repetition_penalty}")
        require(not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop),
                f"stop must be a tuple of strings that are not empty, not {self.stop!r}")
        filters = [name for name, used in (("top_k", self.top_k > 0), ("top_p", self.top_p < 1), ("min_p", self.min_p))
                   if used]
        require(self.temperature > 0 or not filters,
                f"{' and '.join(filters)} would do nothing: temperature 0 always takes the likeliest token")


GREEDY = Sampling()


@dataclass
class Controls:
    """The settings of a batch as tensors (B,), and which features any row needs: constants of a compiled step. most: a
    power of two that no row's top_k exceeds, 0 where none has one; filtered: whether any has a top_p or a min_p."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    seed: Tensor
    random: bool
    most: int
    filtered: bool
    penalised: bool


register(Controls, meta=("random", "most", "filtered", "penalised"))


def controls(rows: Sequence[Sampling], device: torch.device | str | None = None) -> Controls:
    """Put the settings of a batch into tensors."""
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype).to(device)

    seed = torch.tensor([row.seed & MASK32 for row in rows], dtype=torch.long).to(device)
    return Controls(
        column("temperature", torch.float32), column("top_k", torch.long), column("top_p", torch.float32),
        column("min_p", torch.float32), column("repetition_penalty", torch.float32), seed,
        random=any(row.temperature > 0 for row in rows),
        most=1 << (top - 1).bit_length() if (top := max((row.top_k for row in rows), default=0)) else 0,
        filtered=any(row.top_p < 1 or row.min_p > 0 for row in rows),
        penalised=any(row.repetition_penalty != 1 for row in rows))


def choose(logits: Tensor, settings: Controls, position: Tensor, seen: Tensor | None = None) -> Tensor:
    """Choose tokens: logits (B, V) -> ids (B,), without a read back to Python.

    position: (B,) of the token to choose; randomness depends only on it, the row's seed and the token. seen: (B, V)
    bool, the tokens to which the repetition penalty applies.
    """
    scores = logits.float()
    if settings.penalised and seen is not None:
        scores = penalise(scores, settings.penalty, seen)
    if not settings.random:
        return scores.argmax(-1)
    hot = settings.temperature[:, None]
    scores = scores / torch.where(hot > 0, hot, 1.0)
    scores = keep_likely(scores, settings)
    noise = gumbel(settings.seed, position, scores.shape[-1])
    return torch.where(hot > 0, scores + noise, scores).argmax(-1)


def penalise(scores: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Make seen tokens less likely in scores (B, V) (repetition penalty, Keskar et al., 2019)."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)


def keep_likely(scores: Tensor, settings: Controls) -> Tensor:
    """Set scores (B, V) to -inf where top-k, then top-p (Holtzman et al., 2020), then min-p (Nguyen et al., 2024) leave
    them out."""
    if settings.most:
        scores = keep_top(scores, settings.top_k[:, None], settings.most)
    return keep_probable(scores, settings) if settings.filtered else scores


def keep_top(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """Keep the k (B, 1) highest of each row, at most `most`, and those equal to the last of them; all where k is 0."""
    best = scores.topk(min(most, scores.shape[-1])).values
    least = best.gather(-1, (k - 1).clamp(0, best.shape[-1] - 1))
    return scores.masked_fill((scores < least) & (k > 0), -torch.inf)


def keep_probable(scores: Tensor, settings: Controls) -> Tensor:
    """Keep tokens by top-p, then by min-p."""
    ordered, order = scores.sort(-1)
    p = settings.top_p[:, None]
    unlikely = (ordered.softmax(-1).cumsum(-1) <= 1 - p) & (p < 1)
    unlikely[:, -1] = False
    ordered = ordered.masked_fill(unlikely, -torch.inf)
    chance = ordered.softmax(-1)
    ordered = ordered.masked_fill(chance < settings.min_p[:, None] * chance[:, -1:], -torch.inf)
    return torch.empty_like(scores).scatter(-1, order, ordered)


def gumbel(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Noise (B, V) by a hash of (seed, position, token); added to log-probabilities, its argmax is a sample of them."""
    row = scramble(scramble(seed) ^ position)
    token = torch.arange(vocab, device=seed.device) * 0x9E3779B9 & MASK32
    bits = scramble(scramble(row[:, None] ^ token) + row[:, None])
    uniform = ((bits >> 8).float() + 0.5) / (1 << 24)
    return -(-uniform.log()).log()


def scramble(x: Tensor) -> Tensor:
    """Mix integers to 32 bits (the finaliser of MurmurHash3)."""
    x = x & MASK32
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK32
    return x ^ (x >> 16)
