"""Search by the first dimensions of Matryoshka vectors (Kusupati et al., 2022), and re-ranking with all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mm.errors import InputError

from .table import PREFIX, Index, Match, arrays, kept

CANDIDATES = 10  # re-ranked per result that is wanted
LEAST = 200  # re-ranked at least
ROWS = 10_000  # filled in per commit


def add_short(index: Index, dims: int) -> None:
    """Keep a column of the first `dims` dimensions from now on; what is missing of it is filled in, commit by commit.

    Raises InputError for more dimensions than the vectors have.
    """
    import pyarrow as pa

    if dims > index.dim:
        raise InputError(f"--matryoshka {dims} is more than the {index.dim} dimensions of {index.model}")
    name = f"{PREFIX}{dims}"
    if dims not in kept(index.table.schema):
        index.table.add_columns(pa.field(name, pa.list_(pa.float32(), dims)))
    filled = False
    while len(rows := _missing(index, name)):
        vectors = np.stack(rows["vector"].to_numpy())
        part = pa.table({**{column: rows[column] for column in index.key}, name: arrays(vectors, dims)})
        index.table.merge_insert(index.key).when_matched_update_all().execute(part)
        filled = True
    if filled:
        index.optimize()


def _missing(index: Index, name: str) -> Any:
    return index.table.search().where(f"{name} IS NULL").select([*index.key, "vector"]).limit(ROWS).to_arrow()


def nearest_short(index: Index, vector: np.ndarray, top: int, dims: int) -> list[Match]:
    """As `Index.nearest`, of the rows that are nearest by the first `dims` dimensions alone; scores are exact cosines.

    Raises InputError as it does, and for more dimensions than the vectors have.
    """
    index.check_query(vector)
    add_short(index, dims)
    query = index.table.search(vector[:dims], vector_column_name=f"{PREFIX}{dims}").distance_type("cosine")
    query = query.nprobes(index.probes).limit(max(LEAST, CANDIDATES * top))
    found = query.select([*index.shown, "vector"]).to_arrow()
    if not len(found):
        return []
    vectors = np.stack(found["vector"].to_numpy()).astype(np.float64)
    scores = vectors @ vector / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector))
    best = np.argsort(-scores, kind="stable")[:top]
    return Match.all(found.select(index.shown).take(best).to_pydict(), scores[best].tolist())
