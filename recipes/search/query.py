"""`mm search`: the pictures or passages of an index that are nearest to a text, or to a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.files import read_bytes
from .embed import Embedder, SentenceEmbedder, load_embedder
from .gallery import Section, Shown, write_gallery
from .matryoshka import nearest_short
from .table import Index, Match

SHOWN = 100  # characters of a passage


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the pictures that match a text or a picture, or the passages of texts that answer a question.

    Args:
        index: what `mm index` wrote, such as photos.lance.
        text: what to look for, such as "a red bicycle".
        image: look for pictures like this one.
        top: results.
        matryoshka: search with this many leading dimensions and re-rank with all, for models trained so; the first time
            adds them to the index.
        json: print JSON.
        html: write a page with the pictures found as well.
        model: where the index's model lies now, if it was moved.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    index: str = argument()
    text: str | None = argument(None)
    image: str | None = None
    top: PositiveInt = 20
    matryoshka: PositiveInt | None = None
    json: bool = False
    html: str | None = None
    model: str | None = None
    device: str | None = None

    def run(self) -> None:
        if (self.text is None) == (self.image is None):
            raise InputError("mm search wants a text or --image FILE, one of the two")
        index = Index.open(self.index)
        if index.holds == "texts" and (self.image or self.html):
            raise InputError(f"{self.index} is an index of texts: --image and --html are for pictures")
        found = nearest(index, self.text, image=self.image, top=self.top, matryoshka=self.matryoshka, model=self.model,
                        device=self.device)
        query = self.text or self.image
        print(json.dumps(as_json(query, index, found), indent=2, ensure_ascii=False) if self.json else as_table(found))
        if self.html:
            _write_page(self.html, query, index, found, picture=self.image)


def nearest(index: Index, text: str | None = None, *, image: str | Path | bytes | None = None, top: int = 20,
            matryoshka: int | None = None, model: str | None = None, device: str | None = None) -> list[Match]:
    """The nearest pictures or passages of an index to a text or a picture, the best first. Raises InputError for an
    empty text, a picture that cannot be decoded, and a model that is not the index's."""
    embedder = load_embedder(model or index.model, device)
    index.check_model(embedder.name, embedder.fingerprint)
    vector = text_vector(embedder, text) if image is None else image_vector(embedder, image)
    return nearest_short(index, vector, top, matryoshka) if matryoshka else index.nearest(vector, top)


def text_vector(embedder: Embedder | SentenceEmbedder, text: str) -> np.ndarray:
    """A text -> its unit vector (E,). Raises InputError for an empty one."""
    if not text.strip():
        raise InputError("the query is empty; expected some words")
    return embedder.texts([text])[0]


def image_vector(embedder: Embedder, source: str | Path | bytes) -> np.ndarray:
    """A picture file, or its bytes -> its unit vector (E,). Raises InputError when it cannot be decoded."""
    data = source if isinstance(source, bytes) else read_bytes(Path(source).expanduser())
    return embedder.encode(embedder.pieces(data, "the picture" if isinstance(source, bytes) else str(source)))[0]


def as_table(found: list[Match]) -> str:
    """rank, cosine, path; whole paths, one a line, and of a passage the line of its file and how it begins."""
    lines = [f"{rank:>4}  {match.score:>6.4f}  {match.path}{beginning(match)}" for rank, match in enumerate(found, 1)]
    return "\n".join(["rank   score  path", *lines])


def beginning(match: Match) -> str:
    if match.line is None:
        return ""
    words = " ".join(match.caption.split())
    return f":{match.line}\n              {words[:SHOWN - 3] + '...' if len(words) > SHOWN else words}"


def as_json(query: str, index: Index, found: list[Match]) -> dict[str, Any]:
    results = [{"rank": rank, "score": match.score, **{name: getattr(match, name) for name in index.shown}}
               for rank, match in enumerate(found, 1)]
    held = {"pictures": "pictures", "texts": "passages"}[index.holds]
    return {"query": query, "index": str(index.path), "model": index.model, held: len(index), "results": results}


def _write_page(file: str, query: str, index: Index, found: list[Match], picture: str | None) -> None:
    shown = [Shown(file=index.folder / m.path, title=m.caption or m.path, score=m.score, note=m.path) for m in found]
    section = Section(query=query, found=shown, picture=Path(picture).expanduser() if picture else None)
    write_gallery(file, "mm search", [section], f"{len(index)} pictures, {index.model}")
