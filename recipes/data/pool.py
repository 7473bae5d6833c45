"""Independent pieces of work, in this process or in several that each open what they need once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Piece, Result = TypeVar("Piece"), TypeVar("Result")
HERE: list[Callable[[Any], Any]] = []  # the worker of this process


def spread(begin: Callable[[], Callable[[Piece], Result]], pieces: Iterable[Piece], jobs: int) -> Iterator[Result]:
    """What the worker that `begin` returns makes of each piece, in no order. With more than one job, `begin`, pieces
    and results are pickled; the first error ends all."""
    if jobs == 1:
        yield from map(begin(), pieces)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=enter, initargs=(begin,)) as pool:
        waiting = [pool.submit(work, piece) for piece in pieces]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def enter(begin: Callable[[], Callable[[Any], Any]]) -> None:
    HERE[:] = [begin()]


def work(piece: Any) -> Any:
    return HERE[0](piece)
