"""Pictures with one class each, from folders, tables and webdataset shards, split into training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.errors import InputError

from ..data.pictures import ENDINGS, FilePicture, Picture
from ..data.sampler import generator
from ..data.tables import ENDINGS as TABLES
from ..data.tables import IMAGE, records

LABEL = ("label", "class", "class_name", "category", "class_id")
SPLIT = {"": "train", "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "dev": "val", "test": "test", "testing": "test"}
NAMED = ("items", "metadata")  # the tables that make a folder a data set
HOLDING = 7  # the last number of the keys of the generators that choose what is held out


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Pictures and their classes, as indices into `classes`."""

    where: str
    pictures: Sequence[Picture]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What is trained and evaluated on (None: nothing), with the same classes; `notes` tell what was left out."""

    train: Labelled
    val: Labelled | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    picture: Picture
    name: str  # of the class, "" where there is none
    split: str


@dataclass
class Found:
    """Everything in a source."""

    where: str
    entries: list[Entry]
    notes: list[str]

    def of(self, split: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split]


def read_labelled(path: str, val: str | None = None, holdout: float = 0.1, classes: Sequence[str] | None = None
                  ) -> Sets:
    """The training and validation pictures of a source (see `ClassData`). `classes` is their order where it holds
    those of the data; otherwise it is that of their names, or numbers.

    Raises InputError that names the file and line, or the class that is wrong.
    """
    found = read_source(path)
    notes, train, held = list(found.notes), found.of("train"), found.of("val")
    if unused := len(found.of("test")):
        notes.append(f"{found.where}: {unused} pictures of a test split are left alone")
    if not train:
        raise InputError(f"{path} holds no picture with a class to train on")
    if val is not None:
        other = read_source(val)
        notes += other.notes
        held = other.of("val") or other.of("train")
        if not held:
            raise InputError(f"{val} holds no picture with a class to evaluate on")
    elif not held and holdout:
        train, held = hold_out(train, holdout)
    names = ordered({entry.name for entry in train}, classes, path)
    known = [entry for entry in held if entry.name in set(names)]
    notes += account(path, train, held, known, names)
    if held and not known:
        raise InputError(f"{val or path}: no validation picture has a class that training has, such as {names[0]!r}")
    return Sets(train=gathered(path, train, names), val=gathered(val or path, known, names) if known else None,
                notes=tuple(notes))


def ordered(found: set[str], wanted: Sequence[str] | None, where: str) -> tuple[str, ...]:
    if len(found) < 2:
        raise InputError(f"{where} holds one class only, {next(iter(found))!r}: a classifier needs two or more")
    if wanted is not None and set(wanted) == found:
        return tuple(wanted)
    numbers = all(name.isdigit() for name in found)
    return tuple(sorted(found, key=int if numbers else str))


def gathered(where: str, entries: list[Entry], names: tuple[str, ...]) -> Labelled:
    number = {name: i for i, name in enumerate(names)}
    return Labelled(where=where, pictures=[entry.picture for entry in entries], classes=names,
                    labels=[number[entry.name] for entry in entries])


def account(where: str, train: list[Entry], held: list[Entry], known: list[Entry], names: Sequence[str]) -> list[str]:
    """Sentences about classes that are thin, or on one side only."""
    counts, kept = Counter(entry.name for entry in train), {entry.name for entry in known}
    lonely = [name for name in names if counts[name] == 1]
    absent = [name for name in names if held and name not in kept]
    strange = Counter(entry.name for entry in held) - Counter(entry.name for entry in known)
    told = []
    if lonely:
        told.append(f"{where}: {some(lonely)} with one training picture, which is kept in training")
    if absent:
        told.append(f"{where}: {some(absent)} without a validation picture")
    if strange:
        told.append(f"{where}: {strange.total()} validation pictures are left out, their classes are not trained: "
                    f"{', '.join(map(repr, list(strange)[:5]))}")
    return told


def some(names: list[str]) -> str:
    """2 classes ('a', 'b')"""
    told = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({told})"


def hold_out(entries: list[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """A share of every class, at least one picture of those that have two; the same ones each time."""
    members: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        members.setdefault(entry.name, []).append(index)
    chosen: set[int] = set()
    for indices in members.values():
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        chosen |= {indices[i] for i in generator(len(indices), HOLDING).permutation(len(indices))[:count]}
    return ([entry for i, entry in enumerate(entries) if i not in chosen],
            [replace(entry, split="val") for i, entry in enumerate(entries) if i in chosen])


# ---------------------------------------------------------------------------------------------- sources
def read_source(path: str) -> Found:
    if path.endswith(".tar"):
        return counted(path, shard_entries(path))
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"{path} does not exist; expected a folder of classes, a table or .tar shards")
    if place.is_dir():
        tables = [place / (name + ending) for name in NAMED for ending in TABLES if (place / (name + ending)).exists()]
        return counted(str(tables[0]), table_entries(tables[0])) if tables else folder(place)
    if place.suffix.lower() not in TABLES:
        raise InputError(f"{path} is neither a folder nor a file that ends in {', '.join(TABLES)} or .tar")
    return counted(path, table_entries(place))


def counted(where: str, entries: Iterable[Entry]) -> Found:
    """Leaves out what has no class, and says so."""
    entries = list(entries)
    kept = [entry for entry in entries if entry.name]
    lost = len(entries) - len(kept)
    return Found(where, kept, [f"{where}: {lost} pictures without a label were skipped"] if lost else [])


def folder(root: Path) -> Found:
    """A folder of classes, or one with a train folder of classes and others beside it."""
    below = {place.name.lower(): place for place in subfolders(root)}
    if "train" not in below or not subfolders(below["train"]):
        return class_folders(root, "train")
    parts = [class_folders(place, SPLIT[name]) for name, place in below.items() if name in SPLIT]
    odd = [place.name for name, place in below.items() if name not in SPLIT]
    notes = [note for part in parts for note in part.notes]
    notes += [f"{root}: {', '.join(odd)} beside train is left alone"] if odd else []
    return Found(str(root), [entry for part in parts for entry in part.entries], notes)


def class_folders(root: Path, split: str) -> Found:
    """A picture's class is the first folder below `root` that it lies in."""
    entries, empty = [], []
    for place in subfolders(root):
        files = pictures_in(place)
        entries += [Entry(FilePicture(file), place.name, split) for file in files]
        empty += [] if files else [place.name]
    if not entries:
        raise InputError(f"{root} holds no pictures in sub-folders; expected one sub-folder of pictures per class")
    loose = sum(file.suffix.lower() in ENDINGS for file in root.iterdir())
    notes = [f"{root}: {some(sorted(empty))} without a picture left out"] if empty else []
    notes += [f"{root}: {loose} pictures beside the class folders are left alone"] if loose else []
    return Found(str(root), entries, notes)


def subfolders(root: Path) -> list[Path]:
    return sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))


def pictures_in(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())


def table_entries(table: Path) -> Iterator[Entry]:
    """Where labels are numbers and a table named classes lies beside, with columns class_id and name, it names them."""
    names, roots = class_names(table), None
    for where, record in records(table, columns):
        image, label = columns(list(record), where)
        file, name = text(record[image]), text(record[label])
        if not file:
            raise InputError(f"{where}: expected the path of a picture, found {record[image]!r}")
        if names and name and name not in names:
            raise InputError(f"{where}: the class {name} is not among the {len(names)} of {table.parent}/classes")
        split = text(record.get("split")).lower()
        if split not in SPLIT:
            raise InputError(f"{where}: expected the split train, val or test, found {record['split']!r}")
        roots = roots or root_of(table, file)
        yield Entry(FilePicture(roots / file), names.get(name, name), SPLIT[split])


def columns(names: list[str], where: str) -> tuple[str, str]:
    """The column of pictures and that of labels."""
    found = [next((name for name in known if name in names), None) for known in ((*IMAGE, "file"), LABEL)]
    if None in found:
        wanted = "image" if found[0] is None else "label"
        raise InputError(f"{where}: expected a column {wanted}, found {', '.join(names)[:120]}")
    return found[0], found[1]


def text(value: Any) -> str:
    """A cell without the blanks around it; a number as it would be written."""
    return "" if value is None else str(value).strip()


def root_of(table: Path, file: str) -> Path:
    """The folder that paths in a table start from: its own or, if the first picture is not there, the one sub-folder
    in which it is."""
    inside = [place for place in subfolders(table.parent) if (place / file).exists()]
    return inside[0] if len(inside) == 1 and not (table.parent / file).exists() else table.parent


def class_names(table: Path) -> Mapping[str, str]:
    """{number: name} of a table named classes beside this one; empty where there is none."""
    beside = next((table.with_name("classes" + ending) for ending in TABLES
                   if table.with_name("classes" + ending).exists()), None)
    if beside is None or beside == table:
        return {}

    def named(names: list[str], where: str) -> None:
        if not {"class_id", "name"} <= set(names):
            raise InputError(f"{where}: expected columns class_id and name, found {', '.join(names)[:120]}")

    return {text(record["class_id"]): text(record["name"]) for _, record in records(beside, named)}


def shard_entries(pattern: str) -> Iterator[Entry]:
    """Samples with a .cls member, or a .json member with a label."""
    from ..data.shards import parsed, read_samples

    for picture, members in read_samples(pattern, ("cls", "json")):
        name = ""
        for where, ending, content in sorted(members, key=lambda member: member[1]):
            value = parsed(where, ending, content)
            if isinstance(value, dict):
                value = next((value[key] for key in (*LABEL, "cls") if key in value), None)
            name = name or text(value)
        yield Entry(picture, name, "train")
