"""`mm index`: brings the index of a folder up to date, a commit per batch, reading only what changed."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm.errors import InputError

from .arguments import device_option, positive
from .embed import MODEL, Embedder
from .pictures import PictureFile, Walk, batches, decode, read_ahead, read_bytes, walk
from .progress import Bar
from .table import Index, Row

if TYPE_CHECKING:
    from torch import Tensor

TOUCHES = 1000  # paths with a new time but the same picture, per commit
COMMITS = 256  # between two rounds of joining small files


@dataclass(kw_only=True)
class Counts:
    """What a run did, in pictures."""

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
    """A picture to encode: the digest of its file, width and height, preprocessed pixels (3, h, w)."""

    file: PictureFile
    hash: str
    size: tuple[int, int]
    pixels: Tensor


@dataclass(frozen=True)
class Same:
    """A file that was written again with the same picture."""

    file: PictureFile


def index(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    found = walk(args.folder)
    if not found.pictures and not found.unreadable:
        raise InputError(f"{args.folder} holds no pictures")
    model = args.model or MODEL
    if Index.exists(args.to):
        known = Index.open(args.to)
        if known.folder != found.root and known.folder.exists():
            raise InputError(f"{args.to} is the index of {known.folder}, not of {found.root}; give --to another name")
        model = args.model or known.model
    embedder = Embedder.load(model, args.device)
    counts = refresh(open_or_create(args.to, embedder, found.root), embedder, found, args.batch)
    print(f"{counts}; {found.others} other files")
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm index", description="Write or refresh the index of a folder of pictures.")
    parser.add_argument("folder", metavar="PHOTOS", help="folder of pictures, searched with its sub-folders")
    parser.add_argument("--to", required=True, metavar="INDEX", help="the index, such as photos.lance")
    parser.add_argument("--model", help=f"checkpoint, hub name or directory (default: the index's own, else {MODEL})")
    parser.add_argument("--batch", type=positive, default=32, help="pictures per forward pass and commit (default: 32)")
    device_option(parser)
    return parser


def open_or_create(path: str | Path, embedder: Embedder, folder: Path) -> Index:
    """The index there, checked against the model, or a new one."""
    if not Index.exists(path):
        return Index.create(
            path, model=embedder.name, fingerprint=embedder.fingerprint, dim=embedder.dim, folder=folder
        )
    index = Index.open(path)
    index.check_model(embedder.name, embedder.fingerprint)
    if index.folder != folder:
        index.move(folder)
    return index


def refresh(index: Index, embedder: Embedder, found: Walk, batch: int = 32) -> Counts:
    """Makes the index hold exactly the readable pictures of a folder; bad ones are reported and counted."""
    known = index.known()
    run = _Run(index, embedder, known)
    changed = [picture for picture in found.pictures if not _unchanged(picture, known.get(picture.path))]
    run.counts.unchanged = len(found.pictures) - len(changed)
    run.forget(_gone(known, found))
    read = partial(_read, root=found.root, known=known, preprocess=embedder.clip.preprocess)
    with Bar("indexing", len(changed)) as bar:
        for path, reason in found.unreadable.items():
            run.skip(bar, f"{path}: {reason}")
        for files in batches(read_ahead(changed, read), batch):
            run.commit(files, bar)
    run.finish()
    return run.counts


class _Run:
    """One update of an index."""

    def __init__(self, index: Index, embedder: Embedder, known: dict[str, dict[str, Any]]) -> None:
        self.index, self.embedder, self.known = index, embedder, known
        self.counts, self.commits, self.same = Counts(), 0, []

    def commit(self, files: list[tuple[PictureFile, Fresh | Same | InputError]], bar: Bar) -> None:
        """Encodes and writes one batch."""
        bad = [(file.path, str(result)) for file, result in files if isinstance(result, InputError)]
        self.same += [vars(file) for file, result in files if isinstance(result, Same)]
        fresh = [result for _, result in files if isinstance(result, Fresh)]
        vectors = self.embedder.images([item.pixels for item in fresh]) if fresh else np.empty((0, self.index.dim))
        whole = np.isfinite(vectors).all(axis=1)
        bad += [(item.file.path, f"{item.file.path}: the model gave no finite vector") for item in _pick(fresh, ~whole)]
        rows = [_row(item, vector) for item, vector in zip(_pick(fresh, whole), vectors[whole], strict=True)]
        self.index.put(rows)
        self.counts.updated += (updated := sum(row.path in self.known for row in rows))
        self.counts.indexed += len(rows) - updated
        self.forget([path for path, _ in bad if path in self.known])
        for _, reason in bad:
            self.skip(bar, reason)
        self.touch(TOUCHES)
        self.commits += 1
        if self.commits % COMMITS == 0:
            self.index.compact()
        bar.step(len(files))

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


def _unchanged(picture: PictureFile, row: dict[str, Any] | None) -> bool:
    return row is not None and all(row[name] == value for name, value in vars(picture).items())


def _gone(known: dict[str, dict[str, Any]], found: Walk) -> list[str]:
    """Indexed pictures that are no longer there; what lies under an unreadable folder is kept."""
    here = {picture.path for picture in found.pictures}
    closed = tuple(f"{path}/" for path in found.unreadable)
    return [path for path in known if path not in here and not f"{path}/".startswith(closed)]


def _read(file: PictureFile, *, root: Path, known: dict[str, dict[str, Any]], preprocess: Any) -> Fresh | Same:
    data = read_bytes(root / file.path)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if file.path in known and known[file.path]["hash"] == digest:
        return Same(file)
    image = decode(data, file.path)
    return Fresh(file=file, hash=digest, size=image.size, pixels=preprocess(image))


def _row(item: Fresh, vector: np.ndarray) -> Row:
    width, height = item.size
    return Row(**vars(item.file), hash=item.hash, width=width, height=height, vector=vector)


def _pick(items: list[Fresh], chosen: np.ndarray) -> list[Fresh]:
    return [item for item, yes in zip(items, chosen, strict=True) if yes]
