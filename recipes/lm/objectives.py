"""Objectives of language models, which make batches of rows: the next token, masked ones, or left-out spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from ..data.report import Note
from .settings import LmData

NONE = -100  # a target that does not count
NOWHERE = -1  # the document of padding


class Row(NamedTuple):
    """ids (T,) int64, documents (T,) numbers of spans or -1 for padding, learned (T,) bool."""

    ids: np.ndarray
    documents: np.ndarray
    learned: np.ndarray


class LmBatch(NamedTuple):
    """ids and targets (B, T) int64, the latter -100 where nothing is to be predicted; documents (B, T), numbers that
    differ within a row, -1 for padding."""

    ids: Tensor
    targets: Tensor
    documents: Tensor
    notes: Sequence[Note] = ()


class Objective(Protocol):
    """Makes rows of T + `extra` tokens a batch, with a random generator for each row."""

    extra: int

    def __call__(self, rows: Sequence[Row], randoms: Sequence[np.random.Generator]) -> Any: ...


class NextToken:
    """Every token predicts the next one, where that is of its document and learned."""

    extra = 1

    def __call__(self, rows: Sequence[Row], randoms: Sequence[np.random.Generator]) -> LmBatch:
        ids, documents, learned = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        counts = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0) & learned[:, 1:]
        return LmBatch(ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(~counts, NONE), documents[:, :-1].contiguous())


MASKED, RANDOM = 0.8, 0.1  # of the hidden tokens: become <mask>, become another token; the others stay


class Masked:
    """Of each row's tokens, special ones apart, a `share` is to be predicted: as in BERT most of them as <mask>, one in
    ten as a random token, one in ten as itself. Raises InputError for a tokenizer without a mask token."""

    extra = 0

    def __init__(self, tokenizer: Tokenizer, share: float) -> None:
        name = tokenizer.settings.get("mask_token")
        mask = tokenizer.pieces.token_id(name["content"] if isinstance(name, dict) else name) if name else None
        if mask is None:
            raise InputError("the tokenizer has no mask token, which a masked language model needs: "
                             "mm train tokenizer --mask true makes one")
        self.mask, self.share = mask, share
        self.special = np.array(sorted(tokenizer.special_ids | {mask}))
        self.words = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special)

    def __call__(self, rows: Sequence[Row], randoms: Sequence[np.random.Generator]) -> LmBatch:
        ids, targets = zip(*map(self.hide, rows, randoms), strict=True)
        documents = np.stack([row.documents for row in rows])
        return LmBatch(*(torch.from_numpy(part) for part in (np.stack(ids), np.stack(targets), documents)))

    def hide(self, row: Row, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids and targets."""
        usable = np.flatnonzero(row.learned & ~np.isin(row.ids, self.special))
        chosen = random.permutation(usable)[: max(round(len(usable) * self.share), min(len(usable), 1))]
        ids, targets, fate = row.ids.copy(), np.full_like(row.ids, NONE), random.random(len(chosen))
        targets[chosen] = ids[chosen]
        ids[chosen[fate < MASKED]] = self.mask
        other = chosen[(fate >= MASKED) & (fate < MASKED + RANDOM)]
        ids[other] = random.choice(self.words, len(other))
        return ids, targets


SENTINELS = 100  # of T5


class SpanBatch(NamedTuple):
    """What the encoder reads: ids and documents (B, S), -1 where there is padding; what the decoder reads: inputs and
    target_documents (B, T); targets (B, T), -100 where there is nothing to predict. An answer has the document of its
    source."""

    ids: Tensor
    documents: Tensor
    inputs: Tensor
    targets: Tensor
    target_documents: Tensor
    notes: Sequence[Note] = ()


class Answered(NamedTuple):
    """One document of a row: source (S,) with sentinels and target (T,), which begins every span with its sentinel and
    ends with the end token."""

    source: list[int]
    target: list[int]


class Corrupted:
    """Of each document in a row, special tokens apart, a `share` is hidden in spans of `mean` tokens on average, each
    behind a sentinel of its own. A document begins in the decoder with the padding token, as in T5."""

    extra = 0

    def __init__(self, tokenizer: Tokenizer, vocab: int, share: float, mean: float) -> None:
        self.share, self.mean, self.sentinels = share, mean, sentinels(tokenizer, vocab)
        self.start, self.end, self.pad = tokenizer.pad_id, tokenizer.eos_id, tokenizer.pad_id
        self.special = np.array(sorted({*tokenizer.special_ids, *self.sentinels}))

    def __call__(self, rows: Sequence[Row], randoms: Sequence[np.random.Generator]) -> SpanBatch:
        made = [self.documents(row, random) for row, random in zip(rows, randoms, strict=True)]
        sources = [[(i, number) for number, part in row for i in part.source] for row in made]
        targets = [[(i, number) for number, part in row for i in part.target] for row in made]
        inputs = [[(i, number) for number, part in row for i in [self.start, *part.target][:-1]] for row in made]
        (ids, documents), (answers, numbers) = padded(sources, self.pad), padded(targets, NONE)
        return SpanBatch(ids, documents, padded(inputs, self.pad)[0], answers, numbers)

    def documents(self, row: Row, random: np.random.Generator) -> list[tuple[int, Answered]]:
        """The documents of a row by number; padding is left out."""
        cuts = np.flatnonzero(np.diff(row.documents)) + 1
        parts = (np.split(part, cuts) for part in row)
        return [(int(numbers[0]), self.corrupt(ids, learned, random))
                for ids, numbers, learned in zip(*parts, strict=True) if numbers[0] != NOWHERE]

    def corrupt(self, ids: np.ndarray, learned: np.ndarray, random: np.random.Generator) -> Answered:
        """One document; one without anything to hide has an empty target."""
        usable = np.flatnonzero(learned & ~np.isin(ids, self.special))
        hidden = np.zeros(len(ids) + 1, bool)
        hidden[usable] = noise(len(usable), self.share, self.mean, len(self.sentinels), random)
        edges = np.flatnonzero(np.diff(hidden, prepend=False))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))[: len(self.sentinels)]
        source, target, at = [], [], 0
        for sentinel, (a, b) in zip(self.sentinels, runs, strict=False):
            source += [*ids[at:a].tolist(), sentinel]
            target += [sentinel, *ids[a:b].tolist()]
            at = b
        end = [self.end] if target and self.end is not None else []
        return Answered([*source, *ids[at:].tolist()], [*target, *end])


def noise(count: int, share: float, mean: float, most: int, random: np.random.Generator) -> np.ndarray:
    """(count,) bool: which tokens are hidden, in at most `most` spans with others before each."""
    if count < 2:
        return np.zeros(count, bool)
    hidden = min(max(round(count * share), 1), count - 1)
    spans = min(max(round(hidden / mean), 1), hidden, count - hidden, most)
    lengths = np.stack([parts(count - hidden, spans, random), parts(hidden, spans, random)], 1)
    return np.repeat(np.tile([False, True], spans), lengths.flatten())


def parts(whole: int, count: int, random: np.random.Generator) -> np.ndarray:
    """(count,) positive numbers with this sum, every choice of them equally likely."""
    cuts = np.sort(random.permutation(whole - 1)[: count - 1]) + 1
    return np.diff([0, *cuts, whole])


def sentinels(tokenizer: Tokenizer, vocab: int) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... or, where the tokenizer has none, those that a `vocab` of T5's kind
    keeps behind it, the last one first. Raises InputError where there are neither."""
    named = [tokenizer.pieces.token_id(f"<extra_id_{i}>") for i in range(SENTINELS)]
    found = [i for i in named if i is not None] or list(range(vocab - 1, tokenizer.vocab_size - 1, -1))[:SENTINELS]
    if not found:
        raise InputError("the tokenizer has no <extra_id_0> and the vocabulary no spare entries, which span corruption "
                         "needs: mm train tokenizer --sentinels 100 makes some")
    return found


def padded(rows: Sequence[Sequence[tuple[int, int]]], fill: int) -> tuple[Tensor, Tensor]:
    """Rows of (id, document) -> ids and documents (B, T)."""
    length = max(max(map(len, rows)), 1)
    ids, documents = torch.full((len(rows), length), fill), torch.full((len(rows), length), NOWHERE)
    for i, row in enumerate(rows):
        if row:
            ids[i, : len(row)], documents[i, : len(row)] = torch.tensor(row).T
    return ids, documents


def objective_for(kind: str, data: LmData, tokenizer: Tokenizer, vocab: int) -> Objective:
    """`next`, `masked` or `spans` tokens to predict, for a model of `vocab` entries. Raises InputError for a tokenizer
    that does not fit it or lacks the special tokens."""
    if tokenizer.vocab_size > vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} entries, the model's embedding {vocab}: it is not "
                         "this model's tokenizer")
    if kind == "masked":
        return Masked(tokenizer, data.share)
    return Corrupted(tokenizer, vocab, data.share, data.span) if kind == "spans" else NextToken()
