"""Pictures, captions and sounds from tables, folders, webdataset shards and EmojiCross, with random access."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm.errors import InputError

from ..data.emojicross import Queries, emojicross
from ..data.pictures import ENDINGS, ArrayPicture, FilePicture, Picture, SoundFile
from ..data.tables import ENDINGS as TABLES
from ..data.tables import Row, read_table
from .settings import TEMPLATES


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What belongs together: two or three of a picture, captions, the most exact one first, and a sound. `group` is a
    number that items share which say the same."""

    picture: Picture | None
    captions: tuple[str, ...]
    group: int
    sound: SoundFile | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of image, text and audio there are, in this order."""
        held = {"image": self.picture, "text": self.captions, "audio": self.sound}
        return tuple(kind for kind, value in held.items() if value)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The usable items of a source. `notes` says in sentences what was left out; of a folder of classes, `classes`
    are the names, and an item's group is the index of its class."""

    where: str
    items: Sequence[Pair]
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)


def read_pairs(path: str, templates: Sequence[str] = TEMPLATES) -> Pairs:
    """Pairs from a CSV, TSV or JSONL file, a folder (pictures with .txt captions beside them, one a line, or a
    sub-folder per class, whose captions are the `templates` with its name), tar shards ("shards-{0000..0007}.tar") or
    "emojicross" (its training pairs).

    Raises InputError that names the file and line, or says what was expected.
    """
    if path == "emojicross":
        return _emojicross()
    if path.endswith(".tar"):
        from ..data.shards import read_shards

        return _collect(path, ((picture, captions, "", None) for picture, captions in read_shards(path)))
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, templates)
    if not place.exists():
        raise InputError(f"{path} does not exist; expected a table, a folder, .tar shards or emojicross")
    if place.suffix.lower() not in TABLES:
        raise InputError(f"{path} is neither a folder nor a file that ends in {', '.join(TABLES)} or .tar")
    return _collect(str(place), (_entry(row, place.parent) for row in read_table(place)))


def _entry(row: Row, folder: Path) -> tuple[Picture | None, Iterable[str], str, SoundFile | None]:
    return (FilePicture(folder / row.image) if row.image else None, row.captions, row.group,
            SoundFile(folder / row.audio) if row.audio else None)


@dataclass
class _Item:
    captions: list[str] = field(default_factory=list)
    group: str = ""
    picture: Picture | None = None
    sound: SoundFile | None = None


def _collect(where: str, rows: Iterable[tuple[Picture | None, Iterable[str], str, SoundFile | None]]) -> Pairs:
    """Merges rows by picture and sound and counts what is empty. Items with the same `group` or, lacking one, the same
    captions share a group."""
    found: dict[Hashable, _Item] = {}
    empty = sounds = 0
    for picture, captions, group, sound in rows:
        item = found.setdefault((picture, sound) if picture or sound else tuple(captions), _Item())
        words = [" ".join(caption.split()) for caption in captions]
        empty += sum(not caption for caption in words) if sound is None or picture is None else 0
        sounds += sound is not None
        item.captions = list(dict.fromkeys([*item.captions, *filter(None, words)]))
        item.group, item.picture, item.sound = group or item.group, picture, sound
    numbers: dict[Hashable, int] = {}
    items = [Pair(picture=item.picture, captions=tuple(item.captions), sound=item.sound,
                  group=numbers.setdefault(item.group or tuple(item.captions) or key, len(numbers)))
             for key, item in found.items()]
    whole = [item for item in items if len(item.kinds) > 1]
    if not whole:
        missing = "sound with a picture or caption" if sounds else "picture with a caption"
        raise InputError(f"{where} holds no {missing}")
    lonely = "rows with one thing only" if sounds else "pictures without a caption"
    dropped = ((empty, "empty captions were skipped"), (len(items) - len(whole), f"{lonely} were skipped"))
    return Pairs(where=where, items=whole, notes=tuple(f"{where}: {count} {what}" for count, what in dropped if count))


def _folder(folder: Path, templates: Sequence[str]) -> Pairs:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise InputError(f"{folder} holds no picture ({', '.join(sorted(ENDINGS))})")
    if any(file.with_suffix(".txt").exists() for file in files):
        lines = ((file, _lines(file.with_suffix(".txt"))) for file in files)
        return _collect(str(folder), ((FilePicture(file), captions, "", None) for file, captions in lines))
    if any(file.parent == folder for file in files):
        raise InputError(f"{folder} has pictures without captions: expected a .txt file beside each picture, "
                         "or one sub-folder of pictures per class")
    return _classes(folder, files, templates)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _classes(folder: Path, files: list[Path], templates: Sequence[str]) -> Pairs:
    folders = [file.relative_to(folder).parts[0] for file in files]
    number = {name: i for i, name in enumerate(sorted(set(folders)))}
    names = [name.replace("_", " ") for name in number]
    captions = [tuple(template.format(name) for template in templates) for name in names]
    items = [Pair(picture=FilePicture(file), captions=captions[number[name]], group=number[name])
             for file, name in zip(files, folders, strict=True)]
    return Pairs(where=str(folder), items=items, classes=tuple(names))


def _emojicross() -> Pairs:
    images, captions, concept = emojicross().train_pairs()
    items = [Pair(picture=ArrayPicture(f"emojicross:{words[0]}", image), captions=tuple(words), group=int(group))
             for image, words, group in zip(images, captions, concept, strict=True)]
    return Pairs(where="emojicross", items=items)


def emojicross_tests() -> dict[str, Pairs]:
    """The splits S1, S2 and S3: pictures in the style that no training picture has, each with its name."""
    data = emojicross()
    return {split: _named(split, data.test_queries(split)) for split in ("S1", "S2", "S3")}


def _named(split: str, queries: Queries) -> Pairs:
    rows = zip(queries.images, queries.names, queries.concept, strict=True)
    return Pairs(where=f"emojicross {split}", items=[
        Pair(picture=ArrayPicture(f"{split}:{name}", image), captions=(name,), group=int(concept))
        for image, name, concept in rows])
