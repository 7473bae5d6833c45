"""Streaming state: trees of tensors that the caller holds, never hidden on a module.

Every tensor has the batch first, so that a state can be cloned, moved, sliced by row, joined and saved without knowing
what is in it. States are updated in place, inside `torch.no_grad`, with fixed shapes and no reads back to Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from mm.checkpoint.files import replacing
from mm.errors import InputError
from mm.positions.visibility import EMPTY, At
from mm.tree import register, tensors


class State:
    """Base of every streaming state; subclasses are dataclasses registered as pytrees with a `fingerprint`."""

    fingerprint: str

    def clone(self) -> Self:
        return pytree.tree_map_only(Tensor, torch.clone, self)

    def to(self, device: torch.device | str) -> Self:
        return pytree.tree_map_only(Tensor, lambda x: x.to(device), self)

    def select(self, rows: Tensor) -> Self:
        """A copy of the rows with these indices (n,)."""
        return pytree.tree_map_only(Tensor, lambda x: x.index_select(0, rows), self)

    def insert(self, rows: Tensor, other: State) -> None:
        """Overwrite the rows with these indices (n,) by the n rows of another state of the same module and length."""
        self.match(other.fingerprint)
        wanted = {name: (len(rows), *shape[1:]) for name, shape in shapes(self).items()}
        compare("the other state", shapes(other), wanted)
        for (_, mine), (_, theirs) in zip(tensors(self), tensors(other), strict=True):
            mine.index_copy_(0, rows, theirs)

    def match(self, fingerprint: str) -> None:
        if self.fingerprint != fingerprint:
            raise InputError(f"the state was made by a model with spec {self.fingerprint}, not {fingerprint}")

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, at once or not at all."""
        with replacing(Path(path)) as part:
            save_file({name: x.contiguous() for name, x in tensors(self)}, part, {"fingerprint": self.fingerprint})

    def load(self, path: str | Path) -> Self:
        """Fill this state with a saved one; raises InputError when it came from another model, batch or length."""
        try:
            with safe_open(path, "pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                fingerprint = (file.metadata() or {}).get("fingerprint", "unknown")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is not a saved state: {error}") from None
        self.match(fingerprint)
        compare(str(path), {name: tuple(x.shape) for name, x in saved.items()}, shapes(self))
        for name, mine in tensors(self):
            mine.copy_(saved[name])
        return self


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors(state)}


def compare(source: str, given: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for name in wanted | given:
        if given.get(name) != wanted.get(name):
            raise InputError(f"{source}: {name} has shape {given.get(name)}, expected {wanted.get(name)}")


@dataclass
class Write:
    """Where the tokens of one call go: index (B, 1, T, 1) of a slot each. k_at: where the tokens of the slots are after
    the call, of the first `within` slots, where all that is held lies. fresh: where those of the call are, when they
    are all that they can see."""

    index: Tensor
    k_at: At
    fresh: At | None = None
    within: int | None = None


register(Write, meta=("within",))


@dataclass
class Slots:
    """table (B, S + 1, 3): position (-1: empty), document and prefix flag of every slot; shared by caches of one size.

    Slot = position mod S, so a cache of full length is static and a shorter one a ring. The `first` positions keep
    their slots, and the ring is what is left. The last slot takes the writes of tokens that do not exist (padding,
    paused rows) and stays empty.
    """

    table: Tensor
    first: int = 0

    @property
    def size(self) -> int:
        return self.table.shape[1] - 1

    def of(self, position: Tensor) -> Tensor:
        """The slots of positions."""
        if not self.first:
            return position % self.size
        ring = self.first + (position - self.first) % (self.size - self.first)
        return torch.where(position < self.first, position, ring)

    def write(self, at: At, within: int | None = None) -> Write:
        """within: a bound of all positions, those held and those of `at`."""
        position = at.position.expand(len(self.table), -1)
        index = torch.where(position >= 0, self.of(position), self.size)
        document = torch.zeros_like(position) if at.document is None else at.document.expand_as(position)
        prefix = torch.zeros_like(position) if at.prefix is None else at.prefix.expand_as(position).to(position.dtype)
        entry = torch.stack([position.clamp(min=EMPTY), document, prefix], -1)
        self.table.scatter_(1, index.unsqueeze(-1).expand(-1, -1, 3), entry)
        return Write(index[:, None, :, None], self.at(at.document is not None, at.prefix is not None, within),
                     at if at.regular else None, within)

    def at(self, documents: bool, prefixes: bool, within: int | None = None) -> At:
        position, document, prefix = self.table[:, :within].unbind(-1)
        return At(position, document if documents else None, prefix.bool() if prefixes else None)


register(Slots, meta=("first",))


@dataclass
class KVCache:
    """k (B, K, S + 1, E), v (B, K, S + 1, F): rotated keys and values by slot."""

    k: Tensor
    v: Tensor

    def write(self, k: Tensor, v: Tensor, to: Write) -> tuple[Tensor, Tensor, At]:
        """Store new keys and values (B, K, T, *); returns all that may be seen and where it is."""
        self.k.scatter_(2, to.index.expand_as(k), k.to(self.k.dtype))
        self.v.scatter_(2, to.index.expand_as(v), v.to(self.v.dtype))
        if to.fresh is not None:
            return k, v, to.fresh
        return self.k[:, :, :to.within].to(k.dtype), self.v[:, :, :to.within].to(v.dtype), to.k_at


    def sees(self, to: Write) -> At:
        """Where the tokens are that `write` returns."""
        return to.k_at if to.fresh is None else to.fresh


register(KVCache)


@dataclass
class Int8Cache:
    """`KVCache` in 8 bits: k and v int8 with scales (B, K, S + 1, 1) per token and head, half of 1 / 127 of the largest
    number off at most."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def like(cls, k: Tensor, v: Tensor) -> Self:
        """Empty, for keys and values of these shapes."""
        scales = (x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32) for x in (k, v))
        return cls(torch.zeros_like(k, dtype=torch.int8), torch.zeros_like(v, dtype=torch.int8), *scales)

    def write(self, k: Tensor, v: Tensor, to: Write) -> tuple[Tensor, Tensor, At]:
        """As `KVCache.write`; what is returned was rounded, new tokens too."""
        out = []
        for x, held, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            scale = x.float().abs().amax(-1, keepdim=True) / 127
            small = (x.float() / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
            held.scatter_(2, to.index.expand_as(small), small)
            scales.scatter_(2, to.index.expand_as(scale), scale)
            out.append((held[:, :, :to.within] * scales[:, :, :to.within]).to(x.dtype))
        return *out, to.k_at

    def sees(self, to: Write) -> At:
        return to.k_at


register(Int8Cache)


@dataclass
class StackState(State):
    """offset (B,): the position of each row's next token; one `Slots` per distinct cache size, one cache per layer.
    first: so many tokens stay in window, in every layer (`Window.first`)."""

    offset: Tensor
    slots: list[Slots]
    caches: list[KVCache | Int8Cache]
    fingerprint: str
    chunk: int | None
    first: int = 0

    def advance(self, at: At | None, length: int, rows: Tensor | None) -> At:
        """Where the next `length` tokens of each row are; rows (B,) bool that do not advance get no positions."""
        if at is None:
            at = At(self.offset[:, None] + torch.arange(length, device=self.offset.device), whole=True)
        if rows is not None:
            at = At(torch.where(rows[:, None], at.position, EMPTY), at.document, at.prefix, at.coords)
        self.offset.copy_(torch.maximum(self.offset, at.position.amax(1) + 1))
        return at

    def check_length(self, length: int) -> None:
        held = min((slots.size for slots in self.slots), default=length)
        if length > held:
            raise InputError(f"{length} tokens at once do not fit a state of length {held}")

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, or the rows (B,) bool."""
        rows = torch.ones_like(self.offset, dtype=torch.bool) if rows is None else rows
        self.offset.masked_fill_(rows, 0)
        for slots in self.slots:
            slots.table[..., 0].masked_fill_(rows[:, None], EMPTY)
        for cache in self.caches:  # an empty slot must not hold NaN: even with weight 0 it would spread
            for _, held in tensors(cache):
                held.masked_fill_(rows[:, None, None, None], 0)

    def rewind(self, length: Tensor) -> None:
        """Forget the tokens at positions >= length (B,), for example drafts that were not accepted. A layer with a
        window can go back by as many tokens as `chunk`: what lay before them is overwritten."""
        self.offset.copy_(torch.minimum(self.offset, length))
        for slots in self.slots:
            position = slots.table[..., 0]
            position.masked_fill_(position >= length[:, None], EMPTY)


register(StackState, meta=("fingerprint", "chunk", "first"))


def check_state(state: Any, fingerprint: str, batch: int, rows: Tensor | None) -> None:
    """A state fits this model and batch, and nobody wants gradients through it."""
    state.match(fingerprint)
    if state.offset.shape[0] != batch:
        raise InputError(f"the state holds {state.offset.shape[0]} rows and the input {batch}")
    if rows is not None and (rows.dtype != torch.bool or tuple(rows.shape) != (batch,)):
        raise InputError(f"rows should be ({batch},) bool, not {tuple(rows.shape)} {rows.dtype}")
    if torch.is_grad_enabled():
        raise InputError("a state is updated in place: call the model under torch.no_grad()")


