"""Checkpoint families: a layout on disk, its config, its table of weights, and which of them a directory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.files import Folder
from mm.checkpoint.tables import IDENTITY, Table
from mm.errors import InputError
from mm.lazy import imported
from mm.tokenizer.tokenizer import Tokenizer, load_tokenizer

TRAINING_ONLY = frozenset({"dropout", "drop_path"})
FEW = 2  # reasons that one error gives


@dataclass(frozen=True)
class Extras:
    """The contents of a model's directory beside weights and config; None or empty where there is none. `generation` is
    transformers' generation_config.json."""

    preprocess: Any = None
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was found and understood, its weights not yet read."""

    spec: Any
    weights: checkpoint.Weights
    table: Table
    extras: Extras


@dataclass(frozen=True, kw_only=True)
class Family:
    """One layout on disk. `config` is its file; `model_types` are what that file says under `model_type`, and where
    that is not enough `accepts` decides by the config. `weights` are file names, best first; `to_spec(config, where)`
    and `from_spec(spec)` translate; `table(spec, names)` maps weights, where names are those in the file;
    `files(config, extras)` are the JSON files that go beside the weights, the config last; `preprocess(folder, spec)`
    and `labels(config)` read what `files` wrote, and `complete(folder, opened)` adds what other files say about the
    model. `named(config)` are files of weights that a config names itself, which count before `weights`."""

    layout: str
    config: str = checkpoint.CONFIG
    weights: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    accepts: Callable[[Mapping[str, Any]], bool] = lambda config: True
    to_spec: Callable[[Mapping[str, Any], str], Any]
    from_spec: Callable[[Any], dict[str, Any]]
    table: Callable[[Any, Iterable[str]], Table]
    files: Callable[[dict[str, Any], Extras], dict[str, dict[str, Any]]] = lambda config, extras: {
        checkpoint.CONFIG: config}
    preprocess: Callable[[Folder, Any], Any] = lambda folder, spec: None
    labels: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    has_text: bool = False
    complete: Callable[[Folder, Opened], Opened] = lambda folder, opened: opened
    named: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()

    def recognise(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of this layout."""
        typed = not self.model_types or config.get("model_type") in self.model_types
        return bool(config) and typed and self.accepts(config)


def own_family(kind: str, settings: type, **more: Any) -> Family:
    """This package's own layout of a kind of model, whose config holds the spec; `more` are fields of the family."""
    return Family(**{
        "layout": "mm", "weights": (checkpoint.WEIGHTS,), "table": lambda spec, names: IDENTITY,
        "accepts": lambda config: config.get("family") == kind,
        "to_spec": lambda config, where: checkpoint.unpack(config, settings, where),
        "from_spec": lambda spec: checkpoint.pack(kind, spec)} | more)


class Families:
    """The families of some kinds of model. Each is a `Family`, or where one (or several) can be imported from, as
    `module:NAME`, which happens when it is needed. A directory that holds several layouts is read as the first; a
    layout's first family that can hold a model writes it. Layouts are told apart by files, never by a name.

    Args:
        names: of the kinds, for messages.
        listed: of each kind, best first.
        weights: patterns of the files of weights that a hub repository may have, best first.
        files: `module:NAME` of what reads a whole model from one file (path -> `Opened`), by (kind, suffix).
    """

    def __init__(self, names: Mapping[str, str], listed: Mapping[str, Sequence[Family | str]],
                 weights: tuple[str, ...], files: Mapping[tuple[str, str], str] | None = None):
        self.names, self.weights, self.files = names, weights, files or {}
        self.held: dict[str, list[Family]] = {kind: [] for kind in listed}
        self.types: dict[tuple[str, str], Family] = {}  # by kind and `model_type`
        self.left = {kind: list(entries) for kind, entries in listed.items()}

    def each(self, kind: str) -> Iterator[Family]:
        """The families of a kind, imported one after the other."""
        yield from self.held[kind]
        while self.left[kind]:
            yield from self.take(kind, self.left[kind].pop(0))

    def take(self, kind: str, entry: Family | str) -> list[Family]:
        entry = imported(entry) if isinstance(entry, str) else entry
        found = [entry] if isinstance(entry, Family) else list(entry)
        self.held[kind] += found
        for family in found:
            for model_type in family.model_types:
                self.types.setdefault((kind, model_type), family)
        return found

    @property
    def families(self) -> dict[str, tuple[Family, ...]]:
        """All of them, by kind."""
        return {kind: tuple(self.each(kind)) for kind in self.held}

    def find(self, folder: Path | Folder, kind: str) -> Family | None:
        """The layout of a directory: by its `model_type`, or else the first family whose config it has."""
        folder = Folder.of(folder)
        typed = self.types.get((kind, str(folder.json(checkpoint.CONFIG).get("model_type"))))
        if typed is not None and typed.recognise(folder.json(typed.config)):
            return typed
        return next((family for family in self.each(kind) if family.recognise(folder.json(family.config))), None)

    def kind_of(self, folder: Path | Folder) -> str | None:
        """The kind of model that a directory holds, None where no family knows it."""
        folder = Folder.of(folder)
        return next((kind for kind in self.held if self.find(folder, kind)), None)

    def recognise(self, folder: Path | Folder, kind: str) -> Family:
        """The layout of a directory. Raises InputError when it holds another kind of model or none."""
        folder = Folder.of(folder)
        found = self.find(folder, kind)
        if found is None:
            configs = {family.config: None for family in self.each(kind)}
            raise InputError(f"{folder} holds no {self.names[kind]} checkpoint: {folder.describe(tuple(configs))}")
        return found

    def open(self, place: Folder | Path, kind: str, allow_pickle: bool = False, family: Family | None = None) -> Opened:
        """The checkpoint of a directory, or of one file that is a whole model. Raises InputError."""
        if not isinstance(place, Folder) and place.is_file():
            return imported(self.files[kind, place.suffix])(place)
        folder = Folder.of(place)
        family = family or self.recognise(folder, kind)
        config, where = folder.json(family.config), str(folder / family.config)
        spec = family.to_spec(config, where)
        weights = checkpoint.open_weights(folder.path, (*family.named(config), *family.weights),
                                          allow_pickle=allow_pickle)
        tokenizer = load_tokenizer(folder, folder.json(checkpoint.CONFIG)) if family.has_text else None
        extras = Extras(family.preprocess(folder, spec), tokenizer, family.labels(config))
        return family.complete(folder, Opened(spec, weights, family.table(spec, weights.shapes), extras))

    def by_layout(self, kind: str, layout: str) -> tuple[Family, ...]:
        """The families of a kind that write this layout, best first. Raises InputError when there is none."""
        layouts = dict.fromkeys(family.layout for family in self.each(kind))
        if layout not in layouts:
            raise InputError(f"layout should be one of {', '.join(layouts)}, not {layout!r}")
        return tuple(family for family in self.each(kind) if family.layout == layout)

    def to_write(self, kind: str, layout: str, spec: Any) -> tuple[Family, dict[str, Any]]:
        """The first family of a layout that can hold a model, and its config. Raises InputError with the reasons."""
        reasons = []
        for family in self.by_layout(kind, layout):
            try:
                return family, family.from_spec(spec)
            except InputError as error:
                reasons.append(str(error))
        reasons = list(dict.fromkeys(reasons))
        more = f"; nor can {len(reasons) - FEW} other families of that layout" if len(reasons) > FEW else ""
        raise InputError("; nor: ".join(reasons[:FEW]) + more)


class Keys:
    """A config whose keys are taken one by one, so that none is passed over in silence."""

    def __init__(self, data: Any, where: str):
        if not isinstance(data, Mapping):
            raise InputError(f"{where} should be a JSON object, not {data!r}")
        self.left, self.where = dict(data), where

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of one key. Raises InputError when it is absent without a default, or of another type."""
        value = self.left.pop(name, None)
        if value is None:
            if default is ...:
                raise InputError(f"{self.where} has no {name}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{self.where}: {name} should be {' or '.join(k.__name__ for k in kinds)}, not {value!r}")
        return value

    def positive(self, name: str, default: Any = ...) -> int:
        value = self.take(name, int, default)
        if value < 1:
            raise InputError(f"{self.where}: {name} should be positive, not {value}")
        return value

    def pair(self, name: str, default: Any = ...) -> tuple[int, int]:
        """(height, width) from two numbers or one."""
        value = self.take(name, (int, list, tuple), default)
        pair = (value, value) if isinstance(value, int) else tuple(value)
        if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
            raise InputError(f"{self.where}: {name} should be one or two positive numbers, not {value!r}")
        return pair

    def done(self, harmless: Iterable[str] = ()) -> None:
        """Raises InputError for keys nobody took, unless they are known to be harmless or switched off."""
        left = {name: value for name, value in self.left.items() if value and name not in set(harmless)}
        if left:
            listed = ", ".join(f"{name}={value!r}" for name, value in left.items())
            raise InputError(f"{self.where} asks for something that is not supported: {listed}")


def ensure_kept(settings: Any, read_back: Any, layout: str, essence: Callable[[Any], Any] | None = None) -> None:
    """Raises InputError that names the first thing a layout would lose: what it wrote must read back as the same model.
    How it trains is not part of a model's identity."""
    essence = essence or plain
    lost = difference(essence(settings), essence(read_back))
    if lost:
        raise InputError(f"the {layout} layout cannot hold this model: {lost}")


def plain(value: Any, inner: Callable[[Any], Any] | None = None,
          overlooked: frozenset[str] = TRAINING_ONLY) -> Any:
    """A spec as plain data without the overlooked fields; `inner` turns what it holds."""
    inner = inner or plain
    if isinstance(value, tuple):
        return [inner(item) for item in value]
    if not is_dataclass(value):
        return value
    names = [field.name for field in fields(value) if field.name not in overlooked]
    return {"is": type(value).__name__, **{name: inner(getattr(value, name)) for name in names}}


def difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """Describes where two pieces of spec data first differ, None where they are equal."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("is") == theirs.get("is"):
        names = [*ours, *(name for name in theirs if name not in ours)]
        found = (difference(ours.get(n), theirs.get(n), f"{path}.{n}" if path else n) for n in names)
        return next(filter(None, found), None)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)), None)
    return None if ours == theirs else f"{path} is {short(ours)}, where it has {short(theirs)}"


def short(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{key}={short(item)}" for key, item in value.items() if key != "is")
        return f"{value.get('is', '')}({inner})"
    return str(value)
