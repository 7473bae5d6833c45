"""The index on disk: one LanceDB table with a row per picture or passage, and what it must never be mixed with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import InputError

ANN = "{}_idx"
VERSION = "1"
ANN_ROWS = 50_000  # from here on the rows are partitioned; below, every row is compared
PROBES = 20  # partitions compared per query, at least
KEEP = timedelta(hours=1)  # readers of an older state have that long to finish
TEXTS = ("path", "hash", "caption")
NUMBERS = {"pictures": ("size", "mtime_ns", "width", "height"), "texts": ("size", "mtime_ns", "part", "line")}
KEY = {"pictures": ["path"], "texts": ["path", "part"]}  # what tells rows apart, by what an index holds
PREFIX = "vector_"  # + dimensions: the columns beside `vector`


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is indexed: bytes and nanoseconds of its file, a digest of that, a unit vector (E,). A picture has a width
    and a height in pixels; the parts of a text are numbered from 0, begin on a line (from 1), and are the caption."""

    path: str
    size: int
    mtime_ns: int
    hash: str
    caption: str | None
    vector: np.ndarray
    width: int | None = None
    height: int | None = None
    part: int | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Match:
    """What was found; `score` is the exact cosine, `line` where a passage of a text begins."""

    path: str
    score: float
    caption: str | None
    line: int | None = None

    @classmethod
    def all(cls, found: dict[str, list[Any]], scores: Iterable[float]) -> list[Match]:
        """From columns and a score for each row."""
        lines = found.get("line") or [None] * len(found["path"])
        rows = zip(found["path"], scores, found["caption"], lines, strict=True)
        return [cls(path=path, score=score, caption=caption, line=line) for path, score, caption, line in rows]


class Index:
    """An open index. Every change is committed before the call returns; readers see whole commits only."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path, self.table, self.holds = path, table, table.name
        schema = table.schema
        about = schema.field("vector").metadata or {}
        self.model, self.fingerprint = about[b"model"].decode(), about[b"fingerprint"].decode()
        self.folder = Path(schema.field("path").metadata[b"folder"].decode())
        self.dim = schema.field("vector").type.list_size
        self.probes = max(PROBES, _partitions(len(self)) // 50)

    @classmethod
    def create(cls, path: str | Path, *, model: str, fingerprint: str, dim: int, folder: Path,
               holds: str = "pictures") -> Index:
        """An empty index of a folder's pictures or texts as `model` sees them. Raises InputError where something else
        lies."""
        import pyarrow as pa

        path = Path(path).expanduser()
        if path.is_file() or path.is_dir() and set(entry.name for entry in path.iterdir()) - {f"{holds}.lance"}:
            raise InputError(f"{path} exists and is no index of {holds}; give --to another name")
        vector = pa.field("vector", pa.list_(pa.float32(), dim), metadata={"model": model, "fingerprint": fingerprint})
        fields = [pa.field("path", pa.string(), nullable=False, metadata={"folder": str(folder)})]
        fields += [pa.field(name, pa.string()) for name in TEXTS[1:]] + [
            pa.field(name, pa.int64()) for name in NUMBERS[holds]]
        schema = pa.schema([*fields, vector], metadata={"mm": VERSION})
        try:
            return cls(path, _connect(path).create_table(holds, schema=schema))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: the index cannot be written ({error})") from None

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Raises InputError when there is no index, or one of another layout."""
        path = Path(path).expanduser()
        holds = cls.held(path)
        if holds is None:
            raise InputError(f"{path} is no index; `mm index FOLDER/ --model MODEL --to {path}` writes one")
        try:
            table = _connect(path).open_table(holds)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"{path}: the index cannot be read ({error})") from None
        if (written := (table.schema.metadata or {}).get(b"mm", b"none").decode()) != VERSION:
            raise InputError(f"{path}: the index has layout {written}, expected {VERSION}; write it anew")
        return cls(path, table)

    @staticmethod
    def held(path: str | Path) -> str | None:
        """Whether pictures or texts were ever committed there."""
        place = Path(path).expanduser()
        return next((holds for holds in KEY if any((place / f"{holds}.lance/_versions").glob("*.manifest"))), None)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether anything was ever committed there."""
        return cls.held(path) is not None

    @property
    def key(self) -> list[str]:
        """The columns that tell rows apart."""
        return KEY[self.holds]

    def __len__(self) -> int:
        return self.table.count_rows()

    def check_model(self, name: str, fingerprint: str) -> None:
        """Raises InputError, naming both, when the vectors come from another model."""
        if fingerprint != self.fingerprint:
            raise InputError(
                f"{self.path} was written by the model {self.model} ({self.fingerprint}), not by {name} ({fingerprint})"
            )

    def move(self, folder: Path) -> None:
        """The files now lie in another folder, under the same relative paths."""
        self.table.update_field_metadata({"path": "path", "metadata": {"folder": str(folder)}})
        self.folder = folder

    def known(self) -> dict[str, dict[str, Any]]:
        """size, mtime_ns, hash and caption of every file, by path."""
        columns = ["path", "size", "mtime_ns", "hash", "caption"]
        rows = self.table.search().select(columns).limit(max(1, len(self))).to_arrow().to_pylist()
        return {row["path"]: row for row in rows}

    def put(self, rows: Sequence[Row]) -> None:
        """Adds rows, or replaces those of the same path and part; one commit."""
        if not rows:
            return
        columns: dict[str, Any] = {
            name: [getattr(row, name) for row in rows] for name in TEXTS + NUMBERS[self.holds]}
        vectors = np.stack([row.vector for row in rows])
        columns["vector"] = arrays(vectors, self.dim)
        columns |= {f"{PREFIX}{dims}": arrays(vectors, dims) for dims in kept(self.table.schema)}
        self._merge(columns)

    def touch(self, rows: Sequence[dict[str, Any]]) -> None:
        """New size, mtime_ns and, of pictures, caption for known paths whose content is the same; one commit."""
        if rows:
            self._merge({name: [row[name] for row in rows] for name in rows[0]})

    def _merge(self, columns: dict[str, Any]) -> None:
        import pyarrow as pa

        schema = pa.schema([self.table.schema.field(name) for name in columns])
        key = [name for name in self.key if name in columns]
        merge = self.table.merge_insert(key).when_matched_update_all()
        if "vector" in columns:
            merge = merge.when_not_matched_insert_all()
        merge.execute(pa.table(columns, schema=schema))

    def remove(self, paths: Iterable[str]) -> None:
        paths = list(map(quoted, paths))
        for start in range(0, len(paths), 1000):
            self.table.delete(f"path IN ({', '.join(paths[start : start + 1000])})")

    def cut(self, parts: dict[str, int]) -> None:
        """Of each of these texts, forget the parts from this number on."""
        for path, count in parts.items():
            self.table.delete(f"path = {quoted(path)} AND part >= {count}")

    def optimize(self) -> None:
        """Joins small files, drops old states, and keeps a large table partitioned."""
        from lancedb.index import IvfFlat

        rows, stale = len(self), [column for column in self._columns() if self._stale(column)]
        if rows < ANN_ROWS or not stale:
            return self.compact()
        for column in stale:
            if self.table.index_stats(ANN.format(column)):
                self.table.drop_index(ANN.format(column))
        self.compact()  # first: the partitions' centres are learned from a sample, a poor one over many small files
        for column in stale:
            self.table.create_index(column, config=IvfFlat(distance_type="cosine", num_partitions=_partitions(rows)))

    def _columns(self) -> list[str]:
        """The columns of vectors: whole ones, and those of their first dimensions."""
        return ["vector", *(f"{PREFIX}{dims}" for dims in kept(self.table.schema))]

    def _stale(self, column: str) -> bool:
        stats = self.table.index_stats(ANN.format(column))
        return stats is None or stats.num_unindexed_rows > stats.num_indexed_rows // 4 or stats.num_indices > 8

    def compact(self) -> None:
        """Joins small files and drops old states."""
        self.table.optimize(cleanup_older_than=KEEP)

    def warm(self) -> None:
        """Reads the partitions into memory ahead of many queries; without it, each is read when it is first met."""
        for column in self._columns():
            if self.table.index_stats(ANN.format(column)):
                self.table.prewarm_index(ANN.format(column))

    def nearest(self, vector: np.ndarray, top: int) -> list[Match]:
        """The `top` rows with the largest cosine to `vector` (E,), best first.

        Exact below ANN_ROWS rows; above, all rows of the nearest partitions are.
        Raises InputError as `check_query` does.
        """
        self.check_query(vector)
        query = self.table.search(vector, vector_column_name="vector").distance_type("cosine")
        query = query.nprobes(self.probes).limit(top)
        found = query.select([*self.shown, "_distance"]).to_arrow().to_pydict()
        return Match.all(found, [1.0 - distance for distance in found["_distance"]])

    @property
    def shown(self) -> list[str]:
        """The columns of a `Match`."""
        return ["path", "caption", *(["line"] if self.holds == "texts" else [])]

    def check_query(self, vector: np.ndarray) -> None:
        """Raises InputError for a query of another width, or one that is not finite."""
        if vector.shape != (self.dim,):
            raise InputError(f"{self.path} holds vectors of shape ({self.dim},), the query has shape {vector.shape}")
        if not np.isfinite(vector).all():
            raise InputError("the model gave no finite vector for the query")


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _partitions(rows: int) -> int:
    return math.isqrt(rows)


def _connect(path: Path) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are about its own workings
    import lancedb

    return lancedb.connect(path)


def kept(schema: Any) -> list[int]:
    """The numbers of leading dimensions that a table keeps a column of."""
    return [int(name.removeprefix(PREFIX)) for name in schema.names if name.startswith(PREFIX)]


def arrays(vectors: np.ndarray, dims: int) -> Any:
    """vectors (n, E) -> an arrow column of their first dimensions; cosines need no unit length."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(vectors[:, :dims].astype(np.float32).ravel()), dims)
