"""The pictures of a folder, read ahead of the model by a few threads."""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mm.errors import InputError

from ..data.pictures import ENDINGS

if TYPE_CHECKING:
    from PIL import Image

AHEAD = 64  # pictures decoded, or being decoded, before the model asks for them
THREADS = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture in a folder: its path from there with "/", bytes, time, the words of the .txt file beside it."""

    path: str
    size: int
    mtime_ns: int
    caption: str | None


@dataclass(kw_only=True)
class Walk:
    """What a folder holds; `unreadable` are the paths that could not be looked at, each with the reason."""

    root: Path
    pictures: list[PictureFile] = field(default_factory=list)
    others: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, file: Path, captioned: bool) -> None:
        path = self.relative(file)
        try:
            path.encode()
            about = file.stat()
            words = file.with_suffix(".txt").read_text("utf-8", "replace").split() if captioned else []
        except UnicodeEncodeError:
            self.unreadable[ascii(path)] = "the file name is not UTF-8"
            return
        except OSError as error:
            return self.refuse(error)
        if stat.S_ISREG(about.st_mode):
            self.pictures.append(
                PictureFile(path=path, size=about.st_size, mtime_ns=about.st_mtime_ns, caption=" ".join(words) or None)
            )
        else:
            self.unreadable[path] = "not a file that can be read to its end"

    def refuse(self, error: OSError) -> None:
        self.unreadable[self.relative(Path(os.fsdecode(error.filename)))] = error.strerror or str(error)

    def relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def walk(folder: str | Path) -> Walk:
    """All pictures under a folder, sorted by path; hidden files, hidden folders and indexes are passed over.

    Raises InputError when there is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; expected a folder of pictures")
    found = Walk(root=root)
    for place, folders, files in os.walk(root, onerror=found.refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".lance")]
        names = {name for name in files if not name.startswith(".")}
        pictures = [name for name in names if Path(name).suffix.lower() in ENDINGS]
        found.others += len(files) - len(pictures)
        for name in pictures:
            found.add(Path(place, name), captioned=Path(name).with_suffix(".txt").name in names)
    found.pictures.sort(key=lambda picture: picture.path)
    return found


def read_bytes(file: Path) -> bytes:
    """Raises InputError when the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None


def decode(data: bytes, name: str) -> Image.Image:
    """The bytes of a picture as upright RGB. Raises InputError that starts with `name`."""
    from ...encoders.image import read_image

    stream = io.BytesIO(data)
    stream.name = name
    return read_image(stream)


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
