"""Heads that look ahead: each predicts the token one further on (multi-token prediction, DeepSeek-V3, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

from mm import spec
from mm.nn.linear import Linear
from mm.nn.norm import build_norm
from mm.nn.state import StackState
from mm.nn.transformer import Transformer
from mm.positions.visibility import EMPTY, At


class AheadHead(nn.Module):
    """hidden (B, T, D) of the model, or of the head before, and embeddings (B, T, D) of the tokens that followed
    -> hidden (B, T, D), which the model's own head turns to logits of the tokens after those."""

    def __init__(self, dim: int, layer: spec.Layer):
        super().__init__()
        self.token_norm, self.hidden_norm = build_norm(layer.norm, dim), build_norm(layer.norm, dim)
        self.project = Linear(2 * dim, dim, bias=False)
        self.stack = Transformer(spec.Stack(dim=dim, layers=(layer,), final_norm=layer.norm))

    def forward(self, hidden: Tensor, embeddings: Tensor, at: At, state: StackState | None = None) -> Tensor:
        x = self.project(torch.cat([self.token_norm(embeddings), self.hidden_norm(hidden)], -1))
        return self.stack(x, at, state=state)


def look_ahead(heads: Iterable[AheadHead], embed: Callable[[Tensor, At], Tensor], ids: Tensor, hidden: Tensor,
               at: At, states: Iterable[StackState | None] = repeat(None)) -> list[tuple[Tensor, Tensor]]:
    """What the heads make of a text: for head k = 1, 2, ... hidden (B, T - k, D), and which rows exist (B, T - k) bool.

    Row t reads the token at t + k and predicts the one at t + k + 1. It sits at position t and exists where both are
    tokens of one document. ids (B, T), hidden (B, T, D) and `at` are those of the model; states: one per head, to be
    continued from."""
    found = []
    for k, (head, state) in enumerate(zip(heads, states, strict=False), 1):
        if ids.shape[1] <= k:
            break
        first, later = at.rows(0, ids.shape[1] - k), at.rows(k, ids.shape[1])
        there = together(first, later)
        hidden = head(hidden[:, :-1], embed(ids[:, k:], later), first if at.regular else missing(first, there),
                      state)
        found.append((hidden, there))
    return found


def together(first: At, later: At) -> Tensor:
    """(B, T) bool: whether both tokens exist, in one document."""
    there = (first.position >= 0) & (later.position >= 0)
    return there if first.document is None else there & (first.document == later.document)


def missing(at: At, there: Tensor) -> At:
    """`at` with only these tokens (B, T) bool left."""
    return At(torch.where(there, at.position, EMPTY), at.document, at.prefix, at.coords)
