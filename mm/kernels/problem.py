"""What one attention call asks for, checked once and handed to whichever path computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mm.errors import InputError
from mm.rope import Turn
from mm.spec import Sight
from mm.visibility import At, Seen, visible

Bias = Callable[[At, At], Tensor]  # (q_at, k_at) -> (B or 1, H, T, S), added to the scores


@dataclass(frozen=True)
class ByOffset:
    """A bias that depends on key position minus query position alone, for a kernel to compute: what `by_offset` of a
    `Bias` gives. weight: (H,) factors of minus the distance; or (count, H) with buckets (2 * reach + 1,) int32, the
    row of each offset -reach..reach, beyond which the bias stays as it is."""

    weight: Tensor | None
    buckets: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    q_at: At
    k_at: At
    sight: Sight
    scale: float
    q_turn: Turn | None = None
    k_turn: Turn | None = None
    bias: Bias | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    shown: Seen | None = None

    def visible(self) -> Tensor:
        """(B, T, S) bool."""
        return visible(self.q_at, self.k_at, self.sight)

    def seen(self) -> Seen:
        """The same as a mask; `shown` where the caller has it already."""
        return Seen.of(self.visible()) if self.shown is None else self.shown

    def tile(self, rows: tuple[int, int], keys: tuple[int, int]) -> Problem:
        """The same question for the queries rows[0]:rows[1] and the keys keys[0]:keys[1], which are already rotated."""
        shown = self.shown and self.shown.rows(*rows, slice(*keys))
        return replace(self, q_at=self.q_at.rows(*rows), k_at=self.k_at.rows(*keys), q_turn=None, k_turn=None,
                       shown=shown)

    @property
    def aligned(self) -> bool:
        """Queries and keys are the same plain run 0..T-1, known without reading a tensor."""
        return self.q_at.regular and self.k_at.regular and self.q_at.position.shape == self.k_at.position.shape


def check(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> None:
    """Shapes and dtypes of a call; raises `InputError`, never reads values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"attend: {name} must be (B, H, T, E), not of shape {tuple(x.shape)}")
    (b, h, t, e), (bk, kv, s, ek) = q.shape, k.shape
    if b != bk or v.shape[:3] != k.shape[:3]:
        raise InputError(f"attend: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if e != ek:
        raise InputError(f"attend: queries are {e} wide and keys {ek}")
    if h % kv:
        raise InputError(f"attend: {h} query heads cannot share {kv} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"attend: q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if problem.sinks is not None and tuple(problem.sinks.shape) != (h,):
        raise InputError(f"attend: {h} query heads need sinks ({h},), not {tuple(problem.sinks.shape)}")
    for name, at, length in (("q_at", problem.q_at, t), ("k_at", problem.k_at, s)):
        if at.position.ndim != 2 or at.position.shape[1] != length or at.position.shape[0] not in (1, b):
            raise InputError(f"attend: {name} has positions {tuple(at.position.shape)} for {b} rows of {length} tokens")
