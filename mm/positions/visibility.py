"""Where tokens are, and the one rule that says which token sees which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.spec import EVERYWHERE, Window
from mm.tree import register

EMPTY = -1  # the position of a slot or a padding token that does not exist
ANYWHERE = -2  # the position of a learned extra key that every token sees


@dataclass(frozen=True)
class At:
    """Where each token is.

    position: (B, T) integers; -1 marks padding. document: (B, T) ids of packed documents, or None for one per row.
    prefix: (B, T) bool, keys that everyone in the document sees (prefix language models), or None.
    coords: (B, T, A) coordinates for rotary embeddings of several axes; None rotates by `position`.
    Promises, known without reading the tensors: `regular`, that every row is 0..T-1, one document, no padding; `whole`,
    that there is no padding.
    """

    position: Tensor
    document: Tensor | None = None
    prefix: Tensor | None = None
    coords: Tensor | None = None
    regular: bool = False
    whole: bool = False

    @property
    def rotary_positions(self) -> Tensor:
        """What a rotary embedding reads: (B, T) or (B, T, A)."""
        return self.position if self.coords is None else self.coords

    def rows(self, start: int, stop: int) -> At:
        """The tokens start:stop."""
        cut = {name: None if (value := getattr(self, name)) is None else value[:, start:stop]
               for name in ("position", "document", "prefix", "coords")}
        return At(**cut, regular=self.regular and start == 0, whole=self.whole)

    def with_extra_key(self) -> At:
        """One more key at the end, at `ANYWHERE`."""
        def longer(x: Tensor | None, value: int) -> Tensor | None:
            return None if x is None else torch.cat([x, x.new_full((x.shape[0], 1), value)], 1)
        return At(longer(self.position, ANYWHERE), longer(self.document, 0), longer(self.prefix, 0))


register(At, meta=("regular", "whole"))


def along(batch: int, length: int, *, device: torch.device | None = None, coords: Tensor | None = None) -> At:
    """Positions 0..length-1 in every row."""
    return At(torch.arange(length, device=device).expand(batch, length), coords=coords, regular=True, whole=True)


def padded(mask: Tensor) -> At:
    """Positions that count only the tokens where mask (B, T) is true, wherever the padding is."""
    mask = mask.bool()
    return At(torch.where(mask, mask.long().cumsum(1) - 1, EMPTY))


def packed(document: Tensor) -> At:
    """Documents laid end to end: document (B, T) ids, -1 for padding; positions restart where the id changes."""
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    fresh = torch.ones_like(document, dtype=torch.bool)
    fresh[:, 1:] = document[:, 1:] != document[:, :-1]
    start = torch.where(fresh, index, 0).cummax(1).values
    return At(torch.where(document < 0, EMPTY, index - start), document=document)


def visible(q_at: At, k_at: At, window: Window) -> Tensor:
    """(B, T, S) bool: whether query token t sees key token s.

    A key is seen when it exists, lies in the same document and within the window; a prefix key ignores the window's
    right edge; a key at `ANYWHERE` is seen by all. The first positions that stay in sight take the place of as many.
    """
    q, k = q_at.position.unsqueeze(-1), k_at.position.unsqueeze(-2)
    seen = k >= 0
    if window.right is not None:
        near = k <= q + window.right
        seen = seen & (near if k_at.prefix is None else near | k_at.prefix.unsqueeze(-2))
    if window.left is not None:
        near = k >= q - window.left + window.first
        seen = seen & (near | (k < window.first) if window.first else near)
    if window.chunk is not None:
        seen = seen & (k // window.chunk == q // window.chunk)
    if q_at.document is not None and k_at.document is not None:
        seen = seen & (q_at.document.unsqueeze(-1) == k_at.document.unsqueeze(-2))
    return (seen | (k == ANYWHERE)).expand(-1, q.shape[1], -1)


@dataclass(frozen=True)
class Mask:
    """`visible` in the form that is added to scores. added: (B, T, S) float32, 0 where a query sees a key and -inf
    elsewhere; empty: (B, T, 1) bool, the queries that see no key, None where each is known to see one."""

    added: Tensor
    empty: Tensor | None

    @classmethod
    def of(cls, visible: Tensor, all_see: bool = False) -> Mask:
        added = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
        return cls(added, None if all_see else ~visible.any(-1, keepdim=True))

    def rows(self, start: int, stop: int, keys: slice) -> Mask:
        """The part for the queries start:stop and these keys."""
        return Mask(self.added[:, start:stop, keys], None if self.empty is None else self.empty[:, start:stop])

    def zero_empty(self, out: Tensor) -> Tensor:
        """Set the rows of out (B, ..., T, F) whose query sees no key to 0; in place, where no gradient is recorded: the
        caller gives its memory away."""
        empty = self.empty
        if empty is None:
            return out
        for _ in range(out.ndim - 3):
            empty = empty.unsqueeze(1)
        return out.masked_fill(empty, 0.0) if torch.is_grad_enabled() else out.masked_fill_(empty, 0.0)


register(Mask)


def all_visible(q_at: At, k_at: At, window: Window) -> bool:
    """Whether, by structure alone, every query sees every key."""
    return window == EVERYWHERE and k_at.whole and (q_at.document is None or k_at.document is None)
