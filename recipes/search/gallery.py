"""A page of ranked pictures that opens from disk: `mm search --html` and `mm demo --once` write it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from mm.errors import InputError

TEMPLATE = Path(__file__).with_name("gallery.html")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture on the page: its file, what is written under it, its cosine, and a word that shows on hover."""

    file: Path
    title: str
    score: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A query, the picture it was if it was one, and what was found, best first."""

    query: str
    found: Sequence[Shown]
    picture: Path | None = None


def write_gallery(file: str | Path, title: str, sections: Sequence[Section], about: str, footer: str = "") -> None:
    """Writes a page whose pictures are relative links; `about` and `footer` are plain text.

    Raises InputError when the file cannot be written.
    """
    place = Path(file).expanduser()
    page = Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(title),
        about=escape(about),
        footer=escape(footer),
        sections="\n".join(_section(section, place.resolve().parent) for section in sections),
    )
    try:
        place.write_text(page, "utf-8")
    except OSError as error:
        raise InputError(f"{file}: the page cannot be written ({error.strerror})") from None


def _section(section: Section, folder: Path) -> str:
    picture = f'<img src="{_link(section.picture, folder)}" alt="">' if section.picture else ""
    cards = "\n".join(_card(rank, shown, folder) for rank, shown in enumerate(section.found, 1))
    return f"<section>\n<h2>{picture}{escape(section.query)}</h2>\n<ol>\n{cards}\n</ol>\n</section>"


def _card(rank: int, shown: Shown, folder: Path) -> str:
    hover = escape(f"{rank}. {shown.title}" + (f" ({shown.note})" if shown.note else ""))
    link = _link(shown.file, folder)
    return (
        f'<li title="{hover}"><a href="{link}"><img loading="lazy" src="{link}" alt="{escape(shown.title)}"></a>'
        f"<p>{escape(shown.title)}</p><b>{shown.score:.3f}</b></li>"
    )


def _link(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file.resolve(), folder)).as_posix())
