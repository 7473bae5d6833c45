"""Checkpoint families: a layout on disk, its config its weights' table, and which one a folder holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.tables import Table
from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer, load_tokenizer

TRAINING_ONLY = frozenset({"dropout", "drop_path"})
FEW = 2  # reasons that one error tells


@dataclass(frozen=True)
class Extras:
    """What a model's directory holds beside weights and config; None or empty where there is none. `generation` is
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
    """One layout on disk. `config` is its file and `recognise` says whether its content is of this family; `weights`
    are file names, best first; `to_spec(config, where)` and `from_spec(spec)` translate; `table(spec, names)` maps
    weights, where names are those in the file; `files(config, extras)` are the JSON files that go beside the weights,
    the config last; `preprocess(folder, spec)` and `labels(config)` read what `files` wrote, and
    `complete(folder, opened)` what other files say about the model. `named(config)` are files of weights that a config
    names itself, which count before `weights`."""

    layout: str
    config: str
    weights: tuple[str, ...]
    recognise: Callable[[Mapping[str, Any]], bool]
    to_spec: Callable[[Mapping[str, Any], str], Any]
    from_spec: Callable[[Any], dict[str, Any]]
    table: Callable[[Any, Iterable[str]], Table]
    files: Callable[[dict[str, Any], Extras], dict[str, dict[str, Any]]]
    preprocess: Callable[[Path, Any], Any] = lambda folder, spec: None
    labels: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()
    has_text: bool = False
    complete: Callable[[Path, Opened], Opened] = lambda folder, opened: opened
    named: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda config: ()


class Families:
    """The families of every kind of model, by kind. A directory that holds several layouts is read as the first; a
    layout's first family that can hold a model writes it. Layouts are told apart by files, never by a name."""

    def __init__(self, names: Mapping[str, str], families: Mapping[str, tuple[Family, ...]],
                 weights: tuple[str, ...], files: Mapping[tuple[str, str], Callable[[Path], Opened]] | None = None):
        self.names, self.families, self.weights = names, families, weights
        self.files = files or {}  # single files that are whole models, by (kind, suffix)

    def open(self, name_or_dir: str | Path, kind: str, allow_pickle: bool = False) -> Opened:
        """The checkpoint of a directory, a hub name, or one file that is a whole model. Raises InputError."""
        path = Path(name_or_dir).expanduser()
        if path.is_file():
            if (kind, path.suffix) not in self.files:
                known = [suffix for held, suffix in self.files if held == kind]
                hint = f", nor a {self.names[kind]} in one file ({', '.join(known)})" if known else ""
                raise InputError(f"{path} is not a directory with a checkpoint{hint}")
            return self.files[kind, path.suffix](path)
        folder = self.resolve(name_or_dir)
        family = self.recognise(folder, kind)
        where = folder / family.config
        config = checkpoint.read_json(where)
        settings = family.to_spec(config, str(where))
        names = (*family.named(config), *family.weights)
        weights = checkpoint.open_weights(folder, names, allow_pickle=allow_pickle)
        extras = Extras(family.preprocess(folder, settings), load_tokenizer(folder) if family.has_text else None,
                        family.labels(config))
        opened = Opened(settings, weights, family.table(settings, weights.shapes), extras)
        return family.complete(folder, opened)

    def resolve(self, name_or_dir: str | Path) -> Path:
        """The directory of a checkpoint, from the hub where it is not on disk. Raises InputError."""
        return checkpoint.resolve(name_or_dir, self.weights)

    def kind_of(self, folder: Path) -> str | None:
        """The kind of model that a directory holds, None where no family knows it."""
        return next((kind for kind in self.families if self.find(folder, kind)), None)

    def find(self, folder: Path, kind: str) -> Family | None:
        for family in self.families[kind]:
            path = folder / family.config
            if path.is_file() and family.recognise(checkpoint.read_json(path)):
                return family
        return None

    def recognise(self, folder: Path, kind: str) -> Family:
        """The layout of a directory. Raises InputError when it holds another kind of model or none."""
        found = self.find(folder, kind)
        if found is not None:
            return found
        known = dict.fromkeys(family.config for family in self.families[kind])
        seen = []
        for name in (name for name in known if (folder / name).is_file()):
            config = checkpoint.read_json(folder / name)
            named = config.get("model_type") or config.get("family") or config.get("architecture") or "unknown"
            seen.append(f"{name} is of the kind {named}")
        reason = " and ".join(seen) or f"there is no {' or '.join(known)}"
        raise InputError(f"{folder} holds no {self.names[kind]} checkpoint: {reason}")

    def by_layout(self, kind: str, layout: str) -> tuple[Family, ...]:
        """The families of a kind that write this layout, best first. Raises InputError when there is none."""
        layouts = dict.fromkeys(family.layout for family in self.families[kind])
        if layout not in layouts:
            raise InputError(f"layout should be one of {', '.join(layouts)}, not {layout!r}")
        return tuple(family for family in self.families[kind] if family.layout == layout)

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
            told = ", ".join(f"{name}={value!r}" for name, value in left.items())
            raise InputError(f"{self.where} asks for something that is not supported: {told}")


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
    """Where two pieces of spec data first differ, in words."""
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
