"""What `attend` is promised about values, checked on request: reading them waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mm.errors import InputError
from mm.positions.visibility import ANYWHERE, EMPTY, At

wanted = False  # whether a `debug` is open


@contextmanager
def debug() -> Iterator[None]:
    """Inside, every call of `attend`, in whatever model, reads the values of its positions and documents too.

    Raises InputError for a position that means nothing, a broken promise of `At`, and a document that comes back after
    another in the same row, whose two parts would see each other. Slow, and not for compiled models."""
    global wanted
    before, wanted = wanted, True
    try:
        yield
    finally:
        wanted = before


def check_values(q_at: At, k_at: At) -> None:
    """Keys may lie in any order (a ring does), so that only the documents of queries are looked at."""
    check_positions("q_at", q_at, EMPTY)
    check_positions("k_at", k_at, ANYWHERE)
    if q_at.document is not None and k_at.document is not None:
        check_documents(q_at.document)


def check_positions(name: str, at: At, least: int) -> None:
    position = at.position
    if wrong(position < least):
        raise InputError(f"attend: {name} has the position {int(position.min())}; positions count from 0, and "
                         f"{EMPTY} marks padding")
    if at.whole and wrong(position < 0):
        raise InputError(f"attend: {name} is said to be `whole`, and row {row(position < 0)} has padding")
    off = position != torch.arange(position.shape[1], device=position.device)
    if at.regular and wrong(off):
        raise InputError(f"attend: {name} is said to be `regular`, and row {row(off)} does not count from 0")


def check_documents(document: Tensor) -> None:
    """document: (B, T) ids, negative for padding. An id has as many tokens as its first and last are apart."""
    for number, ids in enumerate(document):
        kept = ids[ids >= 0]
        runs = torch.unique_consecutive(kept)
        if len(runs) > len(torch.unique(runs)):
            again = next(int(x) for x in runs if (runs == x).sum() > 1)
            raise InputError(f"attend: document {again} of row {number} ends and begins again; its two parts would see "
                             "each other, so give them two numbers")


def wrong(where: Tensor) -> bool:
    return bool(where.any())


def row(where: Tensor) -> int:
    return int(where.any(1).int().argmax())
