"""What cross-attention keeps of another sequence: its keys and values, projected once for many steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.errors import InputError
from mm.positions.visibility import EMPTY, At
from mm.tree import register

Pairs = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass(frozen=True)
class Memory:
    """Made by `Transformer.remember`. layers: for each block (k (B, K, S, E), v (B, K, S, F)), None where a block has
    no cross-attention; at: where the S tokens are."""

    layers: Pairs
    at: At
    fingerprint: str

    def select(self, rows: Tensor) -> Memory:
        """The rows (B',) by index."""
        layers = tuple(None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.layers)
        at = self.at if self.at.position.shape[0] == 1 else At(
            self.at.position[rows], regular=self.at.regular, whole=self.at.whole)
        return Memory(layers, at, self.fingerprint)

    def insert(self, row: int, other: Memory) -> None:
        """Overwrite one row by the only row of a memory that is no longer. Raises InputError where it is."""
        length, room = other.at.position.shape[1], self.at.position.shape[1]
        if length > room or other.fingerprint != self.fingerprint:
            raise InputError(f"a memory of {length} tokens does not fit one of {room} tokens of this stack")
        self.at.position[row, :length] = other.at.position[0]
        self.at.position[row, length:] = EMPTY
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for held, new in zip(mine or (), theirs or (), strict=True):
                held[row, :, :length] = new[0]


register(Memory, meta=("fingerprint",))
