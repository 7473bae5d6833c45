"""Before and after a stack of text: token embeddings, and the head that scores the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import spec
from mm.errors import InputError
from mm.nn.linear import Linear, linear
from mm.nn.mlp import ACTIVATIONS
from mm.nn.norm import build_norm
from mm.positions.absolute import LearnedPositions
from mm.positions.visibility import At


class Embedding(nn.Module):
    """ids (B, T) or embeddings (B, T, D), and where they are -> (B, T, D). `shared`: another module holds the table of
    tokens, and this one is given embeddings."""

    def __init__(self, dim: int, settings: spec.Embed, *, shared: bool = False):
        super().__init__()
        self.settings = s = settings
        self.tokens = None if shared else Table(s.vocab, dim)
        self.positions = LearnedPositions(s.positions.rows, dim, s.positions.start) if s.positions else None
        self.types = Table(s.types, dim) if s.types else None
        self.norm = build_norm(s.norm, dim)

    def forward(self, ids: Tensor | None, at: At, embeddings: Tensor | None = None,
                types: Tensor | None = None) -> Tensor:
        """types: (B, T) token types, all 0 by default. Embeddings take the place of scaled token embeddings."""
        x = self.look_up(ids) if embeddings is None else embeddings
        if self.positions is not None:
            x = x + self.positions(at.position)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        return F.dropout(self.norm(x), self.settings.dropout, self.training)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D), scaled: what image or audio tokens may be mixed with."""
        x = self.tokens(ids)
        scale = self.settings.scale
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype).item()


class Table(nn.Embedding):
    """ids (...) -> (..., D); without the start values that torch draws."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class LMHead(nn.Module):
    """x (..., D) -> logits (..., V), by a weight (V, D) of its own or by the table of token embeddings."""

    def __init__(self, dim: int, vocab: int, settings: spec.LMHead):
        super().__init__()
        self.settings = s = settings
        self.transform = Transform(dim, s.transform) if s.transform else nn.Identity()
        self.weight = None if s.tied else nn.Parameter(torch.empty(vocab, dim))
        self.bias = nn.Parameter(torch.zeros(vocab)) if s.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """table: the token embeddings (V, D)."""
        return self.finish(linear(self.ready(x), table if self.weight is None else self.weight, self.bias))

    def ready(self, x: Tensor) -> Tensor:
        """What the weight multiplies."""
        x = self.transform(x)
        return x if self.settings.scale == 1.0 else x * self.settings.scale

    def finish(self, logits: Tensor) -> Tensor:
        cap = self.settings.softcap
        return cap * torch.tanh(logits / cap) if cap else logits


class Transform(nn.Module):
    """x (..., D) -> (..., D)."""

    def __init__(self, dim: int, settings: spec.Transform):
        super().__init__()
        self.act = ACTIVATIONS[settings.act]
        self.dense = Linear(dim, dim, bias=settings.bias)
        self.norm = build_norm(settings.norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


def check_ids(ids: Tensor, vocab: int) -> None:
    """For where data enters: raises InputError for ids outside the vocabulary. Reads values."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise InputError(f"ids run from {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocab}")
