"""x"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mm.errors import InputError
from mm.tokenizer.bpe import BytePairs, byte_alphabet
from mm.tokenizer.tokenizer import Tokenizer


class LoosePieces:
    """The pieces of a CLIP-like tokenizer, each merge left out with probability `rate` by the generator `random`."""

    def __init__(self, pieces: BytePairs, rate: float) -> None:
        self.pieces, self.rate, self.random = pieces, rate, np.random.default_rng(0)
        self.size, self.merges = pieces.size, pieces.merges
        self.ranks = {pair: rank for rank, pair in enumerate(pieces.merges)}
        self.ids = pieces.vocabulary()

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for word in self.pieces.words(text) for piece in self.split(word)]

    def split(self, word: str) -> list[str]:
        """The pieces of one word; the last one carries the end-of-word mark."""
        parts = [byte_alphabet()[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            found = [(self.ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False))
                     if pair in self.ranks and self.random.random() >= self.rate]
            if not found:
                return parts
            i = min(found)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


class LooseTokenizer:
    """A tokenizer whose every row has a generator of its own. Raises InputError for one that is not a CLIP-like BPE."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        if not isinstance(tokenizer.pieces, BytePairs):
            raise InputError("data.bpe_dropout needs a byte-pair tokenizer of CLIP's kind, which this model has not")
        self.pieces = LoosePieces(tokenizer.pieces, rate)
        self.tokenizer = replace(tokenizer, pieces=self.pieces)

    def __call__(self, texts: Sequence[str], context: int, randoms: Sequence[np.random.Generator]) -> Tensor:
        """(B, context)"""
        rows = []
        for text, self.pieces.random in zip(texts, randoms, strict=True):
            rows.append(self.tokenizer(text, context))
        return torch.cat(rows)
