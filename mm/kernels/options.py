"""The arguments of one attention call beside q, k and v: checked once, then handed to the path that computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from mm.errors import InputError
from mm.positions.rope import Rotation
from mm.positions.visibility import ANYWHERE, EMPTY, At, Mask, visible
from mm.spec import Window

Bias = Callable[[At, At], Tensor]  # (q_at, k_at) -> (B or 1, H, T, S), added to the scores

SHORT = 1024  # tokens up to which every tile of the kernel that reads keys rotates them again
FEW = 16  # queries, up to which they are rotated by the kernel whatever the number of keys

values_checked = False  # True inside `with debug():`


class ScoreOptions(TypedDict, total=False):
    """Keywords of `attend` that change the scores and weights.

    scale: factor of the products q . k (default E ** -0.5). softcap: scores become softcap * tanh(score / softcap), 0
    leaves them. bias: called for each tile, added after the softcap. sinks: (H,) logits that take weight and give
    nothing. dropout: the share of the weights that is dropped. mask: `Mask.of(visible(q_at, k_at, window))`, where the
    caller has it already.
    """

    scale: float | None
    softcap: float
    bias: Bias | None
    sinks: Tensor | None
    dropout: float
    mask: Mask | None


@dataclass(frozen=True)
class AttentionOptions:
    """All arguments of `attend` beside q, k and v, with their defaults filled in."""

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
    mask: Mask | None = None

    def visible(self) -> Tensor:
        """(B, T, S) bool: which query sees which key."""
        return visible(self.q_at, self.k_at, self.window)

    def full_mask(self) -> Mask:
        """`mask`, computed where the caller gave none."""
        return Mask.of(self.visible()) if self.mask is None else self.mask

    def tile(self, rows: tuple[int, int], keys: tuple[int, int]) -> AttentionOptions:
        """The options for the queries rows[0]:rows[1] and the keys keys[0]:keys[1], which are already rotated."""
        mask = self.mask and self.mask.rows(*rows, slice(*keys))
        return replace(self, q_at=self.q_at.rows(*rows), k_at=self.k_at.rows(*keys), q_rope=None, k_rope=None,
                       mask=mask)

    @property
    def aligned(self) -> bool:
        """Whether queries and keys are the same plain run 0..T-1, known without reading a tensor."""
        return self.q_at.regular and self.k_at.regular and self.q_at.position.shape == self.k_at.position.shape


# ------------------------------------------------------------------------------------------------ shapes
def check(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
    """Check shapes, dtypes and ranges of a call. Raises InputError; reads values only inside `with debug():`."""
    check_heads(q, k, v)
    (b, h, t, _), s = q.shape, k.shape[2]
    if options.sinks is not None and tuple(options.sinks.shape) != (h,):
        raise InputError(f"attend: {h} query heads need sinks ({h},), not {tuple(options.sinks.shape)}")
    if options.softcap < 0 or not 0 <= options.dropout < 1:
        raise InputError(f"attend: softcap must not be negative and dropout lie in 0..1, not {options.softcap} and "
                         f"{options.dropout}")
    for name, at, length in (("q_at", options.q_at, t), ("k_at", options.k_at, s)):
        check_at(name, at, b, length)
    for name, rotation, x in (("q_rope", options.q_rope, q), ("k_rope", options.k_rope, k)):
        if rotation is not None:
            check_rotation(name, rotation, x)
    if values_checked:
        check_values(options.q_at, options.k_at)


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


def check_at(name: str, at: At, batch: int, length: int) -> None:
    position = at.position
    if position.ndim != 2 or position.shape[1] != length or position.shape[0] not in (1, batch):
        raise InputError(f"attend: {name} has positions {tuple(position.shape)} for {batch} rows of {length} tokens")
    if position.is_floating_point():
        raise InputError(f"attend: positions of {name} must be integers, not {position.dtype}")
    for what, x in (("documents", at.document), ("a prefix", at.prefix)):
        if x is not None and (x.ndim != 2 or x.shape[1] != length or x.shape[0] not in (1, batch)):
            raise InputError(f"attend: {name} has {what} {tuple(x.shape)} for {batch} rows of {length} tokens")


def check_rotation(name: str, rotation: Rotation, x: Tensor) -> None:
    shape, (b, h, t, e) = tuple(rotation.cos.shape), x.shape
    fits = len(shape) == 4 and shape[0] in (1, b) and shape[1] in (1, h) and shape[2] == t and shape[3] <= e
    if not fits or rotation.sin.shape != rotation.cos.shape:
        raise InputError(f"attend: {name} has rotations {shape}, which do not fit tokens of shape {tuple(x.shape)}")


def unsupported(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str | None:
    """Say what the kernel does not support in a call, whatever the machine; None where it supports all of it."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel takes float16, bfloat16 and float32, not {q.dtype}"
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if x.shape[-1] % 8 or not 16 <= x.shape[-1] <= 256:
            return f"the kernel takes heads of 16, 24, ... 256 channels, and {name} have {x.shape[-1]}"
    if options.window.first:
        return "the kernel has no first positions that stay in sight"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to compute"
    if options.bias is not None and not hasattr(options.bias, "by_offset"):
        return "the kernel takes biases that are a function of distance"
    if options.q_rope is not None and options.k_rope is not None and (
            options.q_rope.layout, options.q_rope.cos.shape[3]) != (options.k_rope.layout, options.k_rope.cos.shape[3]):
        return "the kernel rotates as many channels of keys as of queries, in one layout"
    return None


# ------------------------------------------------------------------------------------------------ values
@contextmanager
def debug() -> Iterator[None]:
    """Inside, every call of `attend`, in whatever model, also reads the values of its positions and documents.

    Raises InputError for a position that means nothing, a promise of `At` that is broken, and a document that comes
    back after another in the same row, whose two parts would see each other. Slow (it waits for the device), and not
    for compiled models."""
    global values_checked
    before, values_checked = values_checked, True
    try:
        yield
    finally:
        values_checked = before


def check_values(q_at: At, k_at: At) -> None:
    """Check positions and documents. Keys may lie in any order (in a ring they do), so that only the documents of
    queries are read."""
    check_positions("q_at", q_at, EMPTY)
    check_positions("k_at", k_at, ANYWHERE)
    if q_at.document is not None and k_at.document is not None:
        check_documents(q_at.document)


def check_positions(name: str, at: At, least: int) -> None:
    def first_row(where: Tensor) -> int:
        return int(where.any(1).int().argmax())

    position = at.position
    if (position < least).any():
        raise InputError(f"attend: {name} has the position {int(position.min())}; positions count from 0, and "
                         f"{EMPTY} marks padding")
    if at.whole and (position < 0).any():
        raise InputError(f"attend: {name} is said to be `whole`, and row {first_row(position < 0)} has padding")
    off = position != torch.arange(position.shape[1], device=position.device)
    if at.regular and off.any():
        raise InputError(f"attend: {name} is said to be `regular`, and row {first_row(off)} does not count from 0")


def check_documents(document: Tensor) -> None:
    """document: (B, T) ids, negative for padding; every id must be one run of tokens."""
    for number, ids in enumerate(document):
        runs = torch.unique_consecutive(ids[ids >= 0])
        if len(runs) > len(torch.unique(runs)):
            again = next(int(x) for x in runs if (runs == x).sum() > 1)
            raise InputError(f"attend: document {again} of row {number} ends and begins again; its two parts would see "
                             "each other, so give them two numbers")
