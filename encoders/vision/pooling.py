"""From tokens to one vector: pools, and the head that pools, normalises and projects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.errors import InputError
from mm.nn.attention import CrossAttention
from mm.nn.linear import Linear
from mm.nn.mlp import Mlp
from mm.nn.norm import build_norm
from mm.positions.visibility import along, padded
from mm.spec import Attention

from .. import spec
from ..spec import (
    ArgmaxPool,
    EosPool,
    FlattenPool,
    MaxPool,
    MeanMaxPool,
    MeanPool,
    PrefixPool,
    ProbePool,
    QueryPool,
    TokenMeanPool,
    TokenPool,
)


class Simple(nn.Module):
    """The pools without weights. x: (B, N, D) -> (B, D).

    prefix: how many tokens come before the patches. ids: (B, N), where the pool looks for one. real: (B, N) bool, the
    tokens that are not padding, or None.
    """

    def __init__(self, settings: spec.Pool):
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor, prefix: int = 0, ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        match self.settings:
            case TokenPool(index=index):
                return x[:, index]
            case PrefixPool(tokens=tokens, join=join):
                return x[:, :tokens].mean(1) if join == "mean" else x[:, :tokens].flatten(1)
            case TokenMeanPool():
                return torch.cat([x[:, 0], average(x[:, prefix:], None if real is None else real[:, prefix:])], 1)
            case MeanPool(prefix=True) | MaxPool(prefix=True) | MeanMaxPool(prefix=True):
                prefix = 0
            case ArgmaxPool():
                return pick(x, ids.argmax(-1))
            case EosPool(id=eos):
                return pick(x, (ids == eos).int().argmax(-1))
            case FlattenPool(tokens=tokens):
                return flatten(x[:, prefix:], tokens)
        x, real = x[:, prefix:], None if real is None else real[:, prefix:]
        match self.settings:
            case MaxPool():
                return largest(x, real)
            case MeanMaxPool():
                return (average(x, real) + largest(x, real)) / 2
        return average(x, real)


class ProbePooling(nn.Module):
    """x: (B, N, D) -> (B, D)."""

    def __init__(self, dim: int, settings: ProbePool):
        super().__init__()
        self.settings = settings
        self.probe = nn.Parameter(torch.empty(1, dim))
        self.attention = cross_attention(dim, dim, settings.heads)
        self.norm = build_norm(settings.norm, dim)
        self.mlp = Mlp(dim, settings.mlp)
        nn.init.normal_(self.probe, std=dim**-0.5)

    def forward(self, x: Tensor, prefix: int = 0, ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        if not self.settings.prefix:
            x, real = x[:, prefix:], None if real is None else real[:, prefix:]
        y = ask(self.attention, self.probe, x, real)
        return (y + self.mlp(self.norm(y)))[:, 0]


class QueryPooling(nn.Module):
    """x: (B, N, D) -> (B, settings.dim)."""

    def __init__(self, dim: int, settings: QueryPool):
        super().__init__()
        self.query = nn.Parameter(torch.empty(settings.queries, settings.dim))
        self.query_norm, self.token_norm = build_norm(settings.norm, settings.dim), build_norm(settings.norm, dim)
        self.attention = cross_attention(settings.dim, dim, settings.heads)
        self.norm = build_norm(settings.norm, settings.dim)
        self.then = Simple(settings.then)
        nn.init.normal_(self.query)

    def forward(self, x: Tensor, prefix: int = 0, ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        y = ask(self.attention, self.query_norm(self.query), self.token_norm(x), real)
        return self.then(self.norm(y), prefix=1)


def cross_attention(dim: int, memory_dim: int, heads: int) -> CrossAttention:
    return CrossAttention(dim, memory_dim, Attention(heads=heads, kv_heads=heads, head_dim=dim // heads))


def ask(attention: CrossAttention, query: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
    """Learned queries (Q, M) over tokens (B, N, D) -> (B, Q, M)."""
    query = query.expand(x.shape[0], -1, -1)
    x_at = along(*x.shape[:2], device=x.device) if real is None else padded(real)
    return attention(query, along(*query.shape[:2], device=x.device), x, x_at)


def average(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, N, D) -> (B, D), over the tokens that are real (B, N)."""
    return x.mean(1) if real is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def largest(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, N, D) -> (B, D), over the tokens that are real (B, N)."""
    return (x if real is None else x.masked_fill(~real[..., None], -torch.inf)).amax(1)


def flatten(x: Tensor, tokens: int) -> Tensor:
    """(B, tokens, D) -> (B, tokens * D)."""
    if x.shape[1] != tokens:
        raise InputError(f"a flatten pool made for {tokens} patches cannot serve {x.shape[1]}: resize the pictures")
    return x.flatten(1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The token at index (B,) of each row."""
    return x[torch.arange(x.shape[0], device=x.device), index]


def build_pool(settings: spec.Pool, dim: int) -> nn.Module:
    match settings:
        case ProbePool():
            return ProbePooling(dim, settings)
        case QueryPool():
            return QueryPooling(dim, settings)
    return Simple(settings)


class TanhLinear(Linear):
    """x: (..., D) -> (..., E), between -1 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def build_projection(settings: spec.Projection | None, dim: int) -> nn.Module:
    if settings is None:
        return nn.Identity()
    return (TanhLinear if settings.act == "tanh" else Linear)(dim, settings.dim, bias=settings.bias)


class Head(nn.Module):
    """How a tower ends: `pooled` gives (B, D), `proj` of it (B, E)."""

    def __init__(self, dim: int, settings: spec.Head):
        super().__init__()
        width = settings.width(dim)
        self.pool = build_pool(settings.pool, dim)
        self.norm = build_norm(settings.norm, width)
        self.proj = build_projection(settings.proj, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.proj, nn.Linear):
            nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
            if self.proj.bias is not None:
                nn.init.zeros_(self.proj.bias)

    def pooled(self, x: Tensor, prefix: int = 0, ids: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        return self.norm(self.pool(x, prefix, ids, real))
