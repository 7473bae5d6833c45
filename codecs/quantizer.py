"""Split residual vector quantisation: vectors to codes and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn.linear import Linear

from .spec import Quantizer

LEAST_USE = 1e-5


class Codebook(nn.Module):
    """`size` vectors, held as a running sum (V, D) of what fell to each and a running count `usage` (V,): entry v is
    sum[v] / usage[v]. `table` follows when weights are loaded and when the mode changes; after writing to the buffers
    otherwise, call `refresh`."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("initialized", torch.zeros(1))
        self.register_buffer("usage", torch.ones(size))
        self.register_buffer("sum", torch.zeros(size, dim))
        self.register_buffer("table", torch.zeros(size, dim), persistent=False)
        self.register_buffer("offset", torch.zeros(size), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())

    def refresh(self) -> None:
        """table (V, D) and offset (V,) = -|entry|^2 / 2 from the running values. The table is transposed in memory:
        the product with one vector then takes half the time."""
        self.table = (self.sum / self.usage.clamp(min=LEAST_USE)[:, None]).t().contiguous().t()
        self.offset = self.table.square().sum(-1) / -2

    def train(self, mode: bool = True) -> Codebook:
        super().train(mode)
        self.refresh()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """x: (N, D) -> (N,), the nearest entry by Euclidean distance: the largest x . entry - |entry|^2 / 2."""
        return torch.addmm(self.offset, x, self.table.T).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (...) -> (..., D)"""
        return F.embedding(codes, self.table)


class ResidualQuantizer(nn.Module):
    """A projection, codebooks that each quantise what the ones before left over, a projection back."""

    def __init__(self, width: int, codebooks: int, size: int, dim: int):
        super().__init__()
        self.down = Linear(width, dim, bias=False)
        self.codebooks = nn.ModuleList(Codebook(size, dim) for _ in range(codebooks))
        self.up = Linear(dim, width, bias=False)

    def encode(self, x: Tensor, count: int) -> list[Tensor]:
        """x: (B, T, W) -> `count` tensors (B, T)."""
        left, found = self.down(x).flatten(0, 1), []
        for codebook in self.codebooks[:count]:
            code = codebook.encode(left)
            left = left - codebook.decode(code)
            found.append(code.view(x.shape[:2]))
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (B, Q, T) -> (B, T, W)"""
        return self.up(sum(codebook.decode(code) for codebook, code in zip(self.codebooks, codes.unbind(1))))  # noqa: B905


class SplitQuantizer(nn.Module):
    """The semantic codebooks and the acoustic ones, side by side over the same vectors; their decoded sum."""

    def __init__(self, width: int, settings: Quantizer):
        super().__init__()
        s = self.settings = settings
        self.semantic = ResidualQuantizer(width, s.semantic, s.size, s.dim)
        self.acoustic = ResidualQuantizer(width, s.codebooks - s.semantic, s.size, s.dim)

    def encode(self, x: Tensor, count: int) -> Tensor:
        """x: (B, T, W) -> codes (B, count, T), the semantic ones first."""
        first = min(count, self.settings.semantic)
        rest = self.acoustic.encode(x, count - first) if count > first else []
        return torch.stack([*self.semantic.encode(x, first), *rest], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes: (B, Q, T), any number of the codebooks -> (B, T, W)"""
        first = self.settings.semantic
        out = self.semantic.decode(codes[:, :first])
        return out if codes.shape[1] <= first else out + self.acoustic.decode(codes[:, first:])
