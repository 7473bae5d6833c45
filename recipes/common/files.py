"""The files of a folder that a search is about, read ahead of the model by a few threads."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from mm.errors import InputError

AHEAD = 64  # files read, or being read, before the model asks for them
THREADS = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file in a folder: its path from there with "/", bytes, time."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class PictureFile(FoundFile):
    """And the words of the .txt file beside it."""

    caption: str | None


Maker = Callable[..., FoundFile]


@dataclass(kw_only=True)
class Walk:
    """What a folder holds; `unreadable` are the paths that could not be looked at, each with the reason."""

    root: Path
    files: list[FoundFile] = field(default_factory=list)
    others: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, file: Path, names: set[str], make: Maker) -> None:
        path = self.relative(file)
        try:
            path.encode()
            about = file.stat()
            made = make(file, names, path=path, size=about.st_size, mtime_ns=about.st_mtime_ns)
        except UnicodeEncodeError:
            self.unreadable[ascii(path)] = "the file name is not UTF-8"
            return
        except OSError as error:
            return self.refuse(error)
        if stat.S_ISREG(about.st_mode):
            self.files.append(made)
        else:
            self.unreadable[path] = "not a file that can be read to its end"

    def refuse(self, error: OSError) -> None:
        self.unreadable[self.relative(Path(os.fsdecode(error.filename)))] = error.strerror or str(error)

    def relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def walk(folder: str | Path, what: str, endings: Collection[str],
         make: Maker) -> Walk:
    """All files under a folder with these endings, sorted by path; hidden files, hidden folders and indexes are passed
    over. `what` they are is for messages, make(file, names beside it, path=, size=, mtime_ns=) gives its `FoundFile`.

    Raises InputError when there is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; expected a folder of {what}")
    found = Walk(root=root)
    for place, folders, files in os.walk(root, onerror=found.refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".lance")]
        names = {name for name in files if not name.startswith(".")}
        chosen = [name for name in names if Path(name).suffix.lower() in endings]
        found.others += len(files) - len(chosen)
        for name in chosen:
            found.add(Path(place, name), names, make)
    found.files.sort(key=lambda file: file.path)
    return found


def read_bytes(file: Path) -> bytes:
    """Raises InputError when the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result]) -> Iterator[tuple[Item, Result | InputError]]:
    """Each item with what `read` gives or the InputError it raises, in order, read by threads ahead of the caller."""

    def attempt(item: Item) -> tuple[Item, Result | InputError]:
        try:
            return item, read(item)
        except InputError as error:
            return item, error

    rest = iter(items)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
        waiting = deque(pool.submit(attempt, item) for item in islice(rest, AHEAD))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(attempt, item) for item in islice(rest, 1))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch
