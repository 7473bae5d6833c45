"""`mm bench search`: one query among a million vectors, against an exact matrix product."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt

from ..common.progress import Bar
from ..search.table import Index, Row
from .report import Bench, Case, interleave, report

ROWS, DIM, CLUSTERS, TOP = 1_000_000, 512, 10_000, 10
NOISE = 0.5  # length of the step from a cluster's centre
CHUNK = 20_000  # vectors made and written at a time
FASTER, RECALL = 5.0, 0.95


@dataclass(frozen=True, kw_only=True)
class Search(Bench):
    """One query among a million vectors, against an exact matrix product.

    Args:
        rows: vectors.
        queries: queries.
    """

    rows: PositiveInt = ROWS
    queries: PositiveInt = 200

    def run(self) -> int:
        return search(self)


def search(args: Search) -> int:
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
        cases = measure(Path(folder), args.rows, args.queries)
    return report("search", cases, packages=("numpy", "lancedb", "torch"), json_file=args.json)


def measure(folder: Path, rows: int, queries: int) -> list[Case]:
    """Builds the index, asks ours and numpy the same queries in turns, and compares what they find."""
    vectors, asked = np.empty((rows, DIM), np.float32), next(unit_vectors(queries, queries, seed=1))
    built = build(folder / "vectors.lance", vectors)
    index = Index.open(folder / "vectors.lance")
    cold, warm = _seconds(lambda: index.nearest(asked[0], TOP)), _seconds(index.warm)
    ours, found = replay(asked, lambda query: {int(match.path) for match in index.nearest(query, TOP)})
    exact, truth = replay(asked, lambda query: set(np.argpartition(vectors @ query, -TOP)[-TOP:].tolist()))
    timing = interleave(ours, exact, queries)
    recall = float(np.mean([len(mine & best) / TOP for mine, best in zip(found, truth, strict=True)]))
    return [
        Case.timed(f"query, {rows:,} x {DIM}", timing, at_least=FASTER),
        Case(case=f"recall@{TOP}", ours=recall, peer=1.0, ratio=recall, at_least=RECALL, unit="share"),
        Case(case="writing and partitioning", ours=built, unit="s"),
        Case(case="loading the index", ours=warm, unit="s"),
        Case(case="first query, unloaded", ours=cold, unit="s"),
    ]


def unit_vectors(count: int, chunk: int, seed: int) -> Iterator[np.ndarray]:
    """`count` members of CLUSTERS random directions, as chunks (chunk, DIM) float32; the directions never change."""
    centres = _normalised(np.random.default_rng(0).standard_normal((CLUSTERS, DIM), np.float32))
    random = np.random.default_rng([0, seed])
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        noise = random.standard_normal((size, DIM), np.float32) * np.float32(NOISE / math.sqrt(DIM))
        yield _normalised(centres[random.integers(0, CLUSTERS, size)] + noise)


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(path: Path, vectors: np.ndarray) -> float:
    """Fills `vectors` (rows, DIM) and an index with the same; the seconds that the index took."""
    index = Index.create(path, model="made-up", fingerprint="made-up", dim=DIM, folder=path.parent)
    spent, start = 0.0, 0
    with Bar("writing", len(vectors)) as bar:
        for chunk in unit_vectors(len(vectors), CHUNK, seed=0):
            vectors[start : start + len(chunk)] = chunk
            rows = [_row(start + i, vector) for i, vector in enumerate(chunk)]
            spent += _seconds(lambda rows=rows: index.put(rows))
            start += len(chunk)
            bar.step(len(chunk))
        bar.say("partitioning")
        spent += _seconds(index.optimize)
    return spent


def _row(number: int, vector: np.ndarray) -> Row:
    return Row(path=str(number), size=0, mtime_ns=0, hash="", caption=None, width=1, height=1, vector=vector)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def replay(queries: np.ndarray, find: Callable[[np.ndarray], set[int]]) -> tuple[Callable[[], None], list[set[int]]]:
    """A call that answers the next of the queries, beginning again after the last, and the answers so far."""
    rest, answers = itertools.cycle(queries), []
    return lambda: answers.append(find(next(rest))), answers
