"""`mm search`: the pictures or passages of an index that are nearest to a text, or to a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import InputError

from ..common.files import read_bytes
from ..common.options import device_option, positive
from .embed import Embedder, SentenceEmbedder, load_embedder
from .gallery import Section, Shown, write_gallery
from .short import nearest_short
from .table import Index, Match

SHOWN = 100  # characters of a passage


def search(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    if (args.text is None) == (args.image is None):
        raise InputError("mm search wants a text or --image FILE, one of the two")
    index = Index.open(args.index)
    if index.holds == "texts" and (args.image or args.html):
        raise InputError(f"{args.index} is an index of texts: --image and --html are for pictures")
    embedder = load_embedder(args.model or index.model, args.device)
    index.check_model(embedder.name, embedder.fingerprint)
    vector = text_vector(embedder, args.text) if args.image is None else image_vector(embedder, args.image)
    query, short = args.text or args.image, args.matryoshka
    found = nearest_short(index, vector, args.top, short) if short else index.nearest(vector, args.top)
    print(json.dumps(as_json(query, index, found), indent=2, ensure_ascii=False) if args.json
          else as_table(found))
    if args.html:
        _write_page(args.html, query, index, found, picture=args.image)
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm search", description="Find the pictures that match a text or a "
                                     "picture, or the passages of texts that answer a question.")
    parser.add_argument("index", metavar="INDEX", help="what `mm index` wrote, such as photos.lance")
    parser.add_argument("text", nargs="?", help='what to look for, such as "a red bicycle"')
    parser.add_argument("--image", metavar="FILE", help="look for pictures like this one")
    parser.add_argument("--top", type=positive, default=20, help="results (default: 20)")
    parser.add_argument("--matryoshka", type=positive, metavar="DIMS", help="search with the first DIMS dimensions "
                        "and re-rank with all, for models trained so; the first time adds them to the index")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with the pictures found as well")
    parser.add_argument("--model", help="where the index's model lies now, if it was moved")
    device_option(parser)
    return parser


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
