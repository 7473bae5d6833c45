"""Rows of a fixed length out of documents laid end to end: any row of any pass, without those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mm.errors import InputError

from ..data.sampler import generator
from .token_file import TokenFile

DOCUMENTS, HELD_OUT = 20, 21  # the last number of the keys of random generators
NOWHERE = -1  # the document of padding


class Row(NamedTuple):
    """ids (T,) int64, documents (T,) numbers of spans or -1 for padding, learned (T,) bool."""

    ids: np.ndarray
    documents: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True, eq=False)
class Spans:
    """Parts of a token file that are documents of their own: starts and stops (n,) int64 of tokens."""

    file: TokenFile
    starts: np.ndarray
    stops: np.ndarray

    @property
    def size(self) -> int:
        """Tokens in all."""
        return int((self.stops - self.starts).sum())

    def where(self, number: int) -> str:
        """The file and line of a span, for messages."""
        return self.file.where(self.file.document(int(self.starts[number])))


def whole(file: TokenFile) -> Spans:
    """Every document."""
    ends = np.asarray(file.ends)
    return Spans(file, np.concatenate([[0], ends[:-1]]), ends)


def held_out(file: TokenFile, share: float) -> tuple[Spans, Spans]:
    """(training, evaluation): random documents with about this share of the tokens are held out, always the same ones.
    Documents with more than half of that share are cut first. Raises InputError where one side stays empty."""
    spans = shorter(whole(file), max(int(file.size * share / 2), 2))
    order = generator(len(spans.starts), HELD_OUT).permutation(len(spans.starts))
    until = np.cumsum((spans.stops - spans.starts)[order])
    count = int(np.searchsorted(until, file.size * share)) + 1
    out = np.zeros(len(order), bool)
    out[order[:count]] = True
    if out.all():
        raise InputError(f"a share of {share} cannot be held out of {file.size} tokens: give data.val, or holdout 0")
    return Spans(file, spans.starts[~out], spans.stops[~out]), Spans(file, spans.starts[out], spans.stops[out])


def shorter(spans: Spans, most: int) -> Spans:
    """The same tokens in spans of at most `most`."""
    parts = -(-(spans.stops - spans.starts) // most)
    starts = np.repeat(spans.starts, parts)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = starts + within * most
    return Spans(spans.file, starts, np.minimum(starts + most, np.repeat(spans.stops, parts)))


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of `length` tokens and `extra` more, which the next row begins with. Every pass (epoch) lays all spans end
    to end in another order, by the `seed` (None: as they stand), and has every token once, the last row padded."""

    spans: Spans
    length: int
    seed: int | None
    extra: int = 0

    def __len__(self) -> int:
        """Rows of a pass."""
        return max(math.ceil((self.spans.size - self.extra) / self.length), 1)

    def row(self, epoch: int, index: int) -> Row:
        """length + extra tokens."""
        order, ends = self.laid(epoch)
        start = index * self.length
        stop = min(start + self.length + self.extra, int(ends[-1]))
        ids = np.zeros(self.length + self.extra, np.int64)
        documents, learned = np.full(len(ids), NOWHERE, np.int64), np.zeros(len(ids), bool)
        at, place = start, int(np.searchsorted(ends, start, "right"))
        while at < stop:
            number, upto = order[place], min(int(ends[place]), stop)
            first = int(self.spans.stops[number] - (ends[place] - at))
            cut = slice(at - start, upto - start)
            ids[cut] = self.spans.file.tokens[first : first + upto - at]
            learned[cut] = self.spans.file.counted(first, first + upto - at)
            documents[cut] = number
            at, place = upto, place + 1
        return Row(ids, documents, learned)

    def laid(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the spans in a pass, and where each ends in it."""
        return _laid(self.spans, self.seed, epoch)


@lru_cache(maxsize=4)
def _laid(spans: Spans, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(spans.starts)
    order = np.arange(count) if seed is None else generator(seed, epoch, DOCUMENTS).permutation(count)
    return order, np.cumsum((spans.stops - spans.starts)[order])
