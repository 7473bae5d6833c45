"""What cross-attention keeps of another sequence: its keys and values, projected once for many steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.visibility import At


@dataclass(frozen=True)
class Memory:
    """Made by `Transformer.remember`. layers: for each block (k (B, K, S, E), v (B, K, S, F)), None where a block has
    no cross-attention; at: where the S tokens are."""

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    at: At
    fingerprint: str

    def select(self, rows: Tensor) -> Memory:
        """The rows (B',) by index."""
        layers = tuple(None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.layers)
        at = self.at if self.at.position.shape[0] == 1 else At(self.at.position[rows], regular=self.at.regular)
        return Memory(layers, at, self.fingerprint)
