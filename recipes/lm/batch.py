"""Batches of packed documents for language models: what is read and what is to be predicted, made from rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..clip.data import Note
from .packing import Row

NONE = -100  # a target that does not count


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
