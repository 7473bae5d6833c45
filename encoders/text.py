"""The text tower: token and position embeddings, a stack, a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import InputError
from mm.nn.transformer import Transformer
from mm.positions.visibility import padded

from . import spec
from .vision.pooling import Head


class TextTower(nn.Module):
    """ids (B, T) -> tokens (B, T, D), after the final norm where the stack has one."""

    def __init__(self, settings: spec.TextSpec):
        super().__init__()
        self.spec = settings
        dim = settings.stack.dim
        self.tokens = nn.Parameter(torch.empty(settings.vocab, dim))
        self.positions = nn.Parameter(torch.empty(settings.context, dim))
        self.stack = Transformer(settings.stack)
        self.head = Head(dim, settings.head)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """Raises InputError unless ids are integers (B, T) with 1 <= T <= context."""
        self.check(ids)
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        real = self.real(ids)
        return self.stack(x, None if real is None else padded(real))

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """tokens (B, T, D), ids (B, T) -> (B, D), before the projection."""
        return self.head.pooled(tokens, ids=ids, real=self.real(ids))

    def encode(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> features (B, E)."""
        return self.head.proj(self.pool(self(ids), ids))

    def real(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool: the tokens that are not padding; None where padding counts."""
        return None if self.spec.pad is None else ids != self.spec.pad

    def check(self, ids: Tensor) -> None:
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.spec.context:
            raise InputError(f"ids should be (B, T), T from 1 to {self.spec.context}, not of shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids should be integers, not {ids.dtype}")
