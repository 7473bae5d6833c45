"""`mm index`: brings the index of a folder up to date, a commit per batch, reading only what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.files import FoundFile, Walk, batches, read_ahead, read_bytes
from ..common.progress import Bar
from .embed import MODEL, Embedder, Piece, SentenceEmbedder, load_embedder
from .table import Index, Row

TOUCHES = 1000  # paths with a new time but the same content, per commit
COMMITS = 256  # between two rounds of joining small files


@dataclass(kw_only=True)
class Counts:
    """What a run did, in files."""

    indexed: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        done = f"indexed {self.indexed}, updated {self.updated}, removed {self.removed}, unchanged {self.unchanged}"
        return f"{done}, skipped {self.skipped} (bad)"


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A file to encode, its digest, and what becomes a row each: one picture, or the passages of a text."""

    file: FoundFile
    hash: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Same:
    """A file that was written again with the same content."""

    file: FoundFile


@dataclass(frozen=True, kw_only=True)
class IndexFolder:
    """Write or refresh the index of a folder: of its pictures with a CLIP, of its texts (txt, md, rst, jsonl) with a
    sentence encoder such as all-MiniLM-L6-v2.

    Args:
        folder: pictures or texts, searched with the sub-folders.
        to: the index, such as photos.lance.
        model: a shipped model, a directory or a hub name; none is the index's own, or a large CLIP of LAION.
        batch: files per forward pass and commit.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    folder: str = argument()
    to: str
    model: str | None = None
    batch: PositiveInt = 32
    device: str | None = None

    def run(self) -> None:
        counts, others = index_folder(self.folder, self.to, self.model, batch=self.batch, device=self.device)
        print(f"{counts}; {others} other files")


def index_folder(folder: str | Path, to: str | Path, model: str | None = None, *, batch: int = 32,
                 device: str | None = None) -> tuple[Counts, int]:
    """Bring an index up to date -> what was done, and how many files of the folder are of another kind. Raises
    InputError for a folder without pictures or texts and for an index of another folder or model."""
    if Index.exists(to):
        known = Index.open(to)
        root = Path(folder).expanduser().resolve()
        if root.is_dir() and known.folder != root and known.folder.exists():
            raise InputError(f"{to} is the index of {known.folder}, not of {root}; give --to another name")
        model = model or known.model
    embedder = load_embedder(model or MODEL, device)
    found = embedder.walk(folder)
    if not found.files and not found.unreadable:
        raise InputError(f"{folder} holds no {embedder.holds}")
    return refresh(open_or_create(to, embedder, found.root), embedder, found, batch), found.others


def open_or_create(path: str | Path, embedder: Embedder | SentenceEmbedder, folder: Path) -> Index:
    """The index there, checked against the model, or a new one."""
    if not Index.exists(path):
        return Index.create(
            path, model=embedder.name, fingerprint=embedder.fingerprint, dim=embedder.dim, folder=folder,
            holds=embedder.holds)
    index = Index.open(path)
    index.check_model(embedder.name, embedder.fingerprint)
    if index.folder != folder:
        index.move(folder)
    return index


def refresh(index: Index, embedder: Embedder | SentenceEmbedder, found: Walk, batch: int = 32) -> Counts:
    """Makes the index hold exactly the readable files of a folder; bad ones are reported and counted."""
    known = index.known()
    run = _Run(index, embedder, known)
    changed = [file for file in found.files if not _unchanged(file, known.get(file.path))]
    run.counts.unchanged = len(found.files) - len(changed)
    run.forget(_gone(known, found))
    read = partial(_read, root=found.root, known=known, pieces=embedder.pieces)
    with Bar("indexing", len(changed)) as bar:
        for path, reason in found.unreadable.items():
            run.skip(bar, f"{path}: {reason}")
        for files in batches(read_ahead(changed, read), batch):
            run.commit(files, bar)
    run.finish()
    return run.counts


class _Run:
    """One update of an index."""

    def __init__(self, index: Index, embedder: Embedder | SentenceEmbedder, known: dict[str, dict[str, Any]]) -> None:
        self.index, self.embedder, self.known = index, embedder, known
        self.counts, self.commits, self.same = Counts(), 0, []

    def commit(self, files: list[tuple[FoundFile, Fresh | Same | InputError]], bar: Bar) -> None:
        """Encodes and writes one batch."""
        bad = [(file.path, str(result)) for file, result in files if isinstance(result, InputError)]
        self.same += [vars(file) for file, result in files if isinstance(result, Same)]
        rows, failed = self.rows([result for _, result in files if isinstance(result, Fresh)])
        bad += [(path, f"{path}: the model gave no finite vector") for path in failed]
        done = {row.path for row in rows}
        if self.index.holds == "texts":
            self.index.cut({path: sum(row.path == path for row in rows) for path in done & self.known.keys()})
        self.index.put(rows)
        self.counts.updated += (updated := len(done & self.known.keys()))
        self.counts.indexed += len(done) - updated
        self.forget([path for path, _ in bad if path in self.known])
        for _, reason in bad:
            self.skip(bar, reason)
        self.touch(TOUCHES)
        self.commits += 1
        if self.commits % COMMITS == 0:
            self.index.compact()
        bar.step(len(files))

    def rows(self, fresh: list[Fresh]) -> tuple[list[Row], list[str]]:
        """The rows of the files whose vectors are finite, and the paths of the others."""
        pieces = [piece for item in fresh for piece in item.pieces]
        vectors = self.embedder.encode(pieces) if pieces else np.empty((0, self.index.dim))
        rows, failed, at = [], [], 0
        for item in fresh:
            own = vectors[at : (at := at + len(item.pieces))]
            if not np.isfinite(own).all():
                failed.append(item.file.path)
                continue
            about = {"caption": None, **vars(item.file), "hash": item.hash}
            rows += [Row(**about | piece.about, vector=vector) for piece, vector in zip(item.pieces, own, strict=True)]
        return rows, failed

    def touch(self, least: int) -> None:
        if len(self.same) >= least:
            self.index.touch(self.same)
            self.counts.unchanged += len(self.same)
            self.same = []

    def forget(self, paths: list[str]) -> None:
        self.index.remove(paths)
        self.counts.removed += len(paths)

    def skip(self, bar: Bar, reason: str) -> None:
        bar.say(f"skipped {reason}")
        self.counts.skipped += 1

    def finish(self) -> None:
        self.touch(1)
        self.index.optimize()


def _unchanged(file: FoundFile, row: dict[str, Any] | None) -> bool:
    return row is not None and all(row[name] == value for name, value in vars(file).items())


def _gone(known: dict[str, dict[str, Any]], found: Walk) -> list[str]:
    """Indexed files that are no longer there; what lies under an unreadable folder is kept."""
    here = {file.path for file in found.files}
    closed = tuple(f"{path}/" for path in found.unreadable)
    return [path for path in known if path not in here and not f"{path}/".startswith(closed)]


def _read(file: FoundFile, *, root: Path, known: dict[str, dict[str, Any]],
          pieces: Callable[[bytes, str], list[Piece]]) -> Fresh | Same:
    data = read_bytes(root / file.path)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if file.path in known and known[file.path]["hash"] == digest:
        return Same(file)
    return Fresh(file=file, hash=digest, pieces=pieces(data, file.path))
