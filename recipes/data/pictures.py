"""Where a training picture lies: a file, a member of a tar file or an array in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"))
TRIES = 64  # unreadable pictures in a row before a source is given up


@dataclass(frozen=True)
class FilePicture:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def open(self) -> Path:
        return self.path


class SoundFile(FilePicture):
    """A sound, of any kind that libsndfile reads."""


@dataclass(frozen=True)
class TarPicture:
    """A member of an uncompressed tar file, by its place in it (bytes)."""

    shard: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.shard}:{self.member}"

    def open(self) -> io.BytesIO:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = io.BytesIO(file.read(self.size))
        content.name = self.name  # for messages
        return content


@dataclass(frozen=True, eq=False)
class ArrayPicture:
    """A picture in memory, (h, w, 3) uint8."""

    name: str
    pixels: np.ndarray

    def open(self) -> np.ndarray:
        return self.pixels


Picture = FilePicture | TarPicture | ArrayPicture
