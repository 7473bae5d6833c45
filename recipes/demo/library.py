"""What the demo searches: emoji drawn once into the user's cache, and their index."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm.errors import InputError

from ..data.emojicross import SOURCES, cache_dir, demo_pictures
from ..search.embed import Embedder
from ..search.index import open_or_create, refresh
from ..search.pictures import walk
from ..search.progress import Bar
from ..search.table import Index

SIDE = 144  # pixels of a drawing
STYLES = {"openmoji": "OpenMoji", "twemoji": "Twemoji"}
LICENCES = (
    "OpenMoji pictures: designed by OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0.",
    "Twemoji pictures: copyright Twitter, Inc. and other contributors (github.com/jdecked/twemoji), CC BY 4.0.",
)


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result: the picture's path in the library, its name, its artist and the cosine."""

    rank: int
    score: float
    name: str
    style: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Results, best first, and the seconds they took, the model's part included."""

    results: list[Hit]
    seconds: float


class Library:
    """The drawings, their index, and the model that made it."""

    def __init__(self, index: Index, embedder: Embedder) -> None:
        self.index, self.embedder, self.folder = index, embedder, index.folder

    @classmethod
    def open(cls, model: str | Path | None = None) -> Library:
        """Draws and indexes the emoji the first time. Raises InputError when a package or the weights are missing."""
        if model is None:
            from ..weights import emoji_clip

            model = emoji_clip()
        embedder = Embedder.load(model)
        try:
            drawings = draw(home())
        except OSError as error:
            raise InputError(f"the cache {home()} cannot be written ({error.strerror}); set MM_CACHE") from None
        found = walk(drawings)
        index = open_or_create(home() / f"{embedder.fingerprint}.lance", embedder, found.root)
        refresh(index, embedder, found, batch=64)
        return cls(index, embedder)

    def find(self, vector: np.ndarray, top: int) -> list[Hit]:
        """The `top` pictures nearest to a unit vector (E,)."""
        return [
            Hit(rank=rank, score=match.score, name=match.caption, style=_style(match.path), path=match.path)
            for rank, match in enumerate(self.index.nearest(vector, top), 1)
        ]

    def answer(self, make_vector, query: str | bytes, top: int) -> Answer:
        start = time.perf_counter()
        results = self.find(make_vector(self.embedder, query), top)
        return Answer(results=results, seconds=time.perf_counter() - start)
