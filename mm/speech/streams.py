"""Streams of tokens side by side: their delays against each other, and their embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.nn.linear import Linear, constant

NONE = -1  # a token that is not there: it adds nothing to an input and nothing to a loss


def moved(index: Tensor, length: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Clamps index (S, T) of frames to the sequence -> (index, whether that frame exists and is of the same document,
    (B or 1, S, T) bool). documents: (B, T)."""
    inside = index.clamp(0, length - 1)
    there = ((index >= 0) & (index < length)).unsqueeze(0)
    if documents is not None:
        there = there & (documents[:, inside] == documents[:, None])
    return inside, there


def delayed(codes: Tensor, delays: tuple[int, ...], initial: tuple[int, ...],
            documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Delays every stream of codes (B, S, T) -> (the streams with `initial` before their first token (B, S, T), whether
    a token is a frame's own (B or 1, S, T) bool). Packed documents (B, T) begin anew each."""
    frames = torch.arange(codes.shape[2], device=codes.device)
    index, there = moved(frames - constant(delays, codes.device)[:, None], codes.shape[2], documents)
    later = codes.gather(2, index.expand(len(codes), -1, -1))
    return torch.where(there, later, constant(initial, codes.device)[:, None]), there


def aligned(x: Tensor, delays: tuple[int, ...], documents: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Undoes the delays of x (S, B, T, C) -> (x at each frame's own time, whether it is known (B or 1, S, T) bool, None
    where all is)."""
    if not any(delays):
        return x, None
    frames = torch.arange(x.shape[2], device=x.device)
    index, there = moved(frames + constant(delays, x.device)[:, None], x.shape[2], documents)
    return x.gather(2, index[:, None, :, None].expand_as(x)), there


class CodeTables(nn.Module):
    """Embeds codes (B, S, T) -> (B, T, D), the sum of one embedding per stream; `NONE` adds nothing."""

    def __init__(self, streams: int, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(streams, rows, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)

    def rows(self, codes: Tensor) -> Tensor:
        """Numbers codes (..., S) of the first S streams as rows of all tables together -> (..., S)."""
        first = torch.arange(codes.shape[-1], device=codes.device) * self.weight.shape[1]
        return codes.clamp(min=0) + first

    def forward(self, codes: Tensor) -> Tensor:
        flat = codes.transpose(1, 2).flatten(0, 1)
        there = (flat >= 0).to(self.weight.dtype)
        x = F.embedding_bag(self.rows(flat), self.weight.flatten(0, 1), mode="sum", per_sample_weights=there)
        return x.unflatten(0, (codes.shape[0], -1))

    def each(self, codes: Tensor) -> Tensor:
        """Embeds codes (N, S) -> (S, N, D), not summed."""
        return F.embedding(self.rows(codes).T, self.weight.flatten(0, 1)) * (codes >= 0).T.unsqueeze(-1)

    def one(self, code: Tensor, stream: int) -> Tensor:
        """Embeds codes (B,) of one stream -> (B, D)."""
        return F.embedding(code.clamp(min=0), self.weight[stream]) * (code >= 0).unsqueeze(-1)


class TextTable(nn.Module):
    """Embeds tokens (...) -> (..., D); `NONE` gives 0. With `rank`, a narrower table before a projection; where a token
    carries a second speaker's, each has a projection of its own."""

    def __init__(self, settings: spec.TextStream, dim: int, rank: int | None = None):
        super().__init__()
        self.vocab, width = settings.vocab, rank or dim
        self.weight = nn.Parameter(torch.empty(settings.vocab + 1, width))
        self.up = Linear(width, dim, bias=False) if rank else None
        if settings.second and rank:
            self.up.requires_grad_(False)  # Kyutai's package keeps it, and does not use it either
        self.first, self.second = (Linear(width, dim, bias=False) if settings.second else None for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens >= 0).unsqueeze(-1)
        if self.first is None:
            x = F.embedding(tokens.clamp(min=0), self.weight) * there
            return x if self.up is None else self.up(x)
        other = tokens.clamp(min=0) // (self.vocab + 1) - 1
        x = self.first(F.embedding(tokens.clamp(min=0) % (self.vocab + 1), self.weight))
        y = self.second(F.embedding(other.clamp(min=0), self.weight)) * (other >= 0).unsqueeze(-1)
        return (x + y) * there
