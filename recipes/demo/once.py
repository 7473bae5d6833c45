"""`mm demo --once`: sample queries as a page and a file that open without a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mm.errors import InputError

from ..search.gallery import Section, Shown, write_gallery
from .library import LICENCES, SAMPLES, Answer, Hit, Library

TOP = 8
PICTURE = "twemoji/1f98a.png"  # a fox, mirrored so that the picture asked for is not itself in the index


def write_samples(library: Library, out: Path) -> Path:
    """Answers SAMPLES and one picture into OUT/index.html, OUT/results.json and OUT/pictures; gives the page's path.

    Raises InputError when the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        answers = {sample: library.by_text(sample, TOP) for sample in SAMPLES}
        asked = _mirrored(library.folder / PICTURE, out / "pictures" / "query.png")
        by_picture = library.by_picture(asked.read_bytes(), TOP)
        for answer in [*answers.values(), by_picture]:
            _copy(answer.results, library.folder, out / "pictures")
        queries = [_told(text, "text", answer) for text, answer in answers.items()]
        queries.append(_told("pictures/query.png", "picture", by_picture))
        (out / "results.json").write_text(json.dumps(_about(library) | {"queries": queries}, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"--once {out}: cannot be written ({error.strerror})") from None
    sections = [Section(query=text, found=_shown(answer.results, out)) for text, answer in answers.items()]
    sections.append(Section(query="this picture", found=_shown(by_picture.results, out), picture=asked))
    about = f"{len(library.index)} emoji pictures, ranked by a CLIP model; the number is the cosine of the two vectors."
    write_gallery(out / "index.html", "mm demo", sections, about, " ".join(LICENCES))
    return out / "index.html"


def _mirrored(source: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    with Image.open(source) as picture:
        ImageOps.mirror(picture).save(target)
    return target


def _copy(hits: Sequence[Hit], source: Path, target: Path) -> None:
    for hit in hits:
        (target / hit.path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / hit.path, target / hit.path)


def _shown(hits: Sequence[Hit], out: Path) -> list[Shown]:
    return [Shown(file=out / "pictures" / hit.path, title=hit.name, score=hit.score, note=hit.style) for hit in hits]


def _told(query: str, kind: str, answer: Answer) -> dict[str, Any]:
    results = [asdict(hit) | {"path": f"pictures/{hit.path}"} for hit in answer.results]
    return {"query": query, "kind": kind, "seconds": answer.seconds, "results": results}


def _about(library: Library) -> dict[str, Any]:
    embedder = library.embedder
    return {
        "model": embedder.name,
        "fingerprint": embedder.fingerprint,
        "pictures": len(library.index),
        "licences": LICENCES,
    }
