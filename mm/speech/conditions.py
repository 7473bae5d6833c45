"""Conditions of a duplex model beside its streams: words of a list, and sequences of vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.errors import InputError
from mm.nn.linear import Linear
from mm.tree import register

Value = Sequence[str | None] | Tensor | Sequence[Tensor | None]


@dataclass(frozen=True)
class Conditioned:
    """Conditions as a model reads them, each None where it has none: added (B, 1, D) to every frame, cross (B, S, D)
    for cross-attention, before (B, P, D) in front of the frames."""

    added: Tensor | None = None
    cross: Tensor | None = None
    before: Tensor | None = None


register(Conditioned)


class ChoiceOf(nn.Module):
    """Embeds one word or None per row -> (B, 1, D)."""

    float32 = ("table", "absent", "out.weight")

    def __init__(self, name: str, settings: spec.Choice, dim: int):
        super().__init__()
        self.name, self.settings = name, settings
        self.table = nn.Parameter(torch.empty(settings.bins + 1, settings.dim))
        self.out = Linear(settings.dim, dim, bias=False)
        self.absent = nn.Parameter(torch.empty(dim)) if settings.learned_absence else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)
        if self.absent is not None:
            nn.init.normal_(self.absent, std=0.2)

    def index(self, word: str | None) -> int:
        """Returns the row of a word in the table. Raises InputError for a word that is not in the list."""
        s = self.settings
        if word is None:
            return s.bins
        if not s.values:
            return int(hashlib.sha256(word.encode()).hexdigest(), 16) % s.bins
        if word not in s.values:
            raise InputError(f"{self.name} should be one of {', '.join(s.values)}, not {word!r}")
        return s.values.index(word)

    def forward(self, words: Sequence[str | None]) -> Tensor:
        rows = torch.tensor([self.index(word) for word in words], device=self.table.device)
        there = torch.tensor([word is not None for word in words], device=self.table.device)
        return absence(self.out(F.embedding(rows, self.table)).unsqueeze(1), there[:, None], self.absent)


class VectorsOf(nn.Module):
    """Projects vectors (S, width) or None per row -> (B, S, D); shorter rows are filled with the vector for absence."""

    float32 = ("absent", "out.weight")

    def __init__(self, name: str, settings: spec.Vectors, dim: int):
        super().__init__()
        self.name, self.settings = name, settings
        self.out = Linear(settings.dim, dim, bias=False)
        self.absent = nn.Parameter(torch.empty(dim)) if settings.learned_absence else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.absent is not None:
            nn.init.normal_(self.absent, std=0.2)

    def forward(self, rows: Sequence[Tensor | None]) -> Tensor:
        width = self.settings.dim
        wrong = next((tuple(x.shape) for x in rows if x is not None and (x.ndim != 2 or x.shape[1] != width)), None)
        if wrong is not None:
            raise InputError(f"{self.name} should be vectors (S, {width}) for each row, not {wrong}")
        longest = max((len(x) for x in rows if x is not None), default=1)
        held = self.out.weight.new_zeros(len(rows), longest, width)
        there = torch.zeros(len(rows), longest, dtype=torch.bool, device=held.device)
        for i, x in enumerate(rows):
            if x is not None:
                held[i, :len(x)], there[i, :len(x)] = x.to(held), True
        return absence(self.out(held), there, self.absent)


def absence(x: Tensor, there: Tensor, absent: Tensor | None) -> Tensor:
    """Returns x (B, S, D) where there (B, S) is true, elsewhere the learned vector for absence, or 0."""
    return torch.where(there.unsqueeze(-1), x, 0 if absent is None else absent)


class Conditions(nn.Module):
    """Reads values by name -> `Conditioned`."""

    def __init__(self, settings: spec.Conditioning, dim: int):
        super().__init__()
        self.settings = settings
        kinds = {spec.Choice: ChoiceOf, spec.Vectors: VectorsOf}
        self.of = nn.ModuleDict({one.name: kinds[type(one.of)](one.name, one.of, dim) for one in settings.conditions})

    def forward(self, values: Mapping[str, Value], batch: int) -> Conditioned:
        """Embeds values of `batch` rows each; None or a name left out is a row without one. Raises InputError."""
        unknown = [name for name in values if name not in self.of]
        if unknown:
            raise InputError(f"there is no condition {unknown[0]!r}, only {', '.join(self.of)}")
        made = {}
        for name, module in self.of.items():
            rows = values.get(name, [None] * batch)
            if len(rows) != batch:
                raise InputError(f"{name} should hold a value for each of {batch} rows, not {len(rows)}")
            made[name] = module(rows)
        parts = {into: [made[one.name] for one in self.settings.conditions if one.into == into]
                 for into in ("sum", "cross", "prepend")}
        wrong = next((x.shape[1] for x in parts["sum"] if x.shape[1] != 1), None)
        if wrong is not None:
            raise InputError(f"a condition that is added to every frame is one vector a row, not {wrong}")
        cross = torch.cat(parts["cross"], 1) if parts["cross"] else None
        if cross is not None and self.settings.cross_positions:
            cross = cross + self.settings.cross_positions * sines(cross.shape[1], cross)
        return Conditioned(sum(parts["sum"]) if parts["sum"] else None, cross,
                           torch.cat(parts["prepend"][::-1], 1) if parts["prepend"] else None)


def sines(length: int, like: Tensor) -> Tensor:
    """(length, D) positions as cosines, then sines, of periods from 2 pi to 20000 pi."""
    half = like.shape[-1] // 2
    at = torch.arange(length, device=like.device, dtype=like.dtype)[:, None]
    phase = at / 10000 ** (torch.arange(half, device=like.device, dtype=like.dtype) / (half - 1))
    return torch.cat([phase.cos(), phase.sin()], -1)
