"""What one attention call asks for, checked once and handed to whichever path computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mm.errors import InputError
from mm.positions.rope import Rotation
from mm.positions.visibility import At, Mask, visible
from mm.spec import Window

Bias = Callable[[At, At], Tensor]  # (q_at, k_at) -> (B or 1, H, T, S), added to the scores


@dataclass(frozen=True)
class Problem:
    q_at: At
    k_at: At
    window: Window
    scale: float
    q_rope: Rotation | None = None
    k_rope: Rotation | None = None
    bias: Bias | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0
    dropout: float = 0.0
    known_mask: Mask | None = None

    def visible(self) -> Tensor:
        """(B, T, S) bool."""
        return visible(self.q_at, self.k_at, self.window)

    def mask(self) -> Mask:
        """The same as a `Mask`: `known_mask` where the caller has it already."""
        return Mask.of(self.visible()) if self.known_mask is None else self.known_mask

    def tile(self, rows: tuple[int, int], keys: tuple[int, int]) -> Problem:
        """The same question for the queries rows[0]:rows[1] and the keys keys[0]:keys[1], which are already rotated."""
        mask = self.known_mask and self.known_mask.rows(*rows, slice(*keys))
        return replace(self, q_at=self.q_at.rows(*rows), k_at=self.k_at.rows(*keys), q_rope=None, k_rope=None,
                       known_mask=mask)

    @property
    def aligned(self) -> bool:
        """Queries and keys are the same plain run 0..T-1, known without reading a tensor."""
        return self.q_at.regular and self.k_at.regular and self.q_at.position.shape == self.k_at.position.shape


def check(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> None:
    """Shapes, dtypes and ranges of a call; raises `InputError`, never reads a tensor's values (`debug` does)."""
    check_heads(q, k, v)
    (b, h, t, _), s = q.shape, k.shape[2]
    if problem.sinks is not None and tuple(problem.sinks.shape) != (h,):
        raise InputError(f"attend: {h} query heads need sinks ({h},), not {tuple(problem.sinks.shape)}")
    if problem.softcap < 0 or not 0 <= problem.dropout < 1:
        raise InputError(f"attend: softcap must not be negative and dropout lie in 0..1, not {problem.softcap} and "
                         f"{problem.dropout}")
    for name, at, length in (("q_at", problem.q_at, t), ("k_at", problem.k_at, s)):
        check_place(name, at, b, length)
    for name, rotation, x in (("q_rope", problem.q_rope, q), ("k_rope", problem.k_rope, k)):
        if rotation is not None:
            check_rotation(name, rotation, x)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"attend: {name} must be (B, H, T, E), not of shape {tuple(x.shape)}")
    (b, h, _, e), (bk, kv, _, ek) = q.shape, k.shape
    if b != bk or v.shape[:3] != k.shape[:3]:
        raise InputError(f"attend: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if e != ek:
        raise InputError(f"attend: queries are {e} wide and keys {ek}")
    if kv == 0 or h % kv:
        raise InputError(f"attend: {h} query heads cannot share {kv} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"attend: q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise InputError(f"attend: q, k and v must be on one device, not {q.device}, {k.device}, {v.device}")


def check_place(name: str, at: At, batch: int, length: int) -> None:
    place = at.position
    if place.ndim != 2 or place.shape[1] != length or place.shape[0] not in (1, batch):
        raise InputError(f"attend: {name} has positions {tuple(place.shape)} for {batch} rows of {length} tokens")
    if place.is_floating_point():
        raise InputError(f"attend: positions of {name} must be integers, not {place.dtype}")
    for what, x in (("documents", at.document), ("a prefix", at.prefix)):
        if x is not None and (x.ndim != 2 or x.shape[1] != length or x.shape[0] not in (1, batch)):
            raise InputError(f"attend: {name} has {what} {tuple(x.shape)} for {batch} rows of {length} tokens")


def check_rotation(name: str, rotation: Rotation, x: Tensor) -> None:
    shape, (b, h, t, e) = tuple(rotation.cos.shape), x.shape
    fits = len(shape) == 4 and shape[0] in (1, b) and shape[1] in (1, h) and shape[2] == t and shape[3] <= e
    if not fits or rotation.sin.shape != rotation.cos.shape:
        raise InputError(f"attend: {name} has rotations {shape}, which do not fit tokens of shape {tuple(x.shape)}")
