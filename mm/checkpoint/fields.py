"""Configs as lists of fields, each read in both directions: a key of theirs, and where its value stands in our spec.

A family's config is one list. Read from first to last it gathers values such as `mixer.heads`; written, every field
takes its value from the same place of a spec. Families extend the list of their ancestor: a field replaces the one with
the same key. What one key does not say by itself (layers that differ, rotary settings) is a `pair` of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from mm.checkpoint.family import Keys
from mm.errors import InputError
from mm.spec import Attention, Embed, LMHead, Mlp, Moe, RMSNorm, Router

PARTS = {"embed": Embed, "head": LMHead, "mixer": Attention, "mlp": Mlp, "norm": RMSNorm, "moe": Moe, "expert": Mlp,
         "shared": Mlp, "router": Router}
KINDS = {float: (int, float)}


class Values(dict[str, Any]):
    """The values that were read so far, by place: `mixer.heads` is the field `heads` of the part `mixer`."""

    def fields(self, part: str) -> dict[str, Any]:
        return {place.partition(".")[2]: value for place, value in self.items() if place.startswith(part + ".")}

    def make(self, part: str, **more: Any) -> Any:
        """The piece of a spec that a part is, of the class under `part.is` or the usual one."""
        given = self.fields(part) | more
        return given.pop("is", PARTS.get(part))(**given)


class Pieces(SimpleNamespace):
    """The pieces of a spec that is written, by part; each None where the model has none."""

    def at(self, place: str) -> Any:
        """The value at a place. Raises InputError for a model without it."""
        part, _, name = place.partition(".")
        piece = getattr(self, part, None)
        if not hasattr(piece, name):
            raise InputError(f"the hf layout of this kind holds a {name} of its {part}, which this model has not")
        return getattr(piece, name)


@dataclass(frozen=True)
class Entry:
    """`read(keys, values)` takes keys of a config and adds to the values; `write(pieces)` gives the keys again."""

    key: str
    read: Callable[[Keys, Values], None]
    write: Callable[[Any], Mapping[str, Any]] = lambda pieces: {}


def field(key: str, *places: str, kind: type = int, default: Any = ..., load: Callable[[Any], Any] = lambda x: x,
          save: Callable[[Any], Any] = lambda x: x) -> Entry:
    """One key, whose value stands in all these places and is written from the first. `kind` int means a count from 1
    on; a default may be a function of the values read before. `load` makes ours of theirs and `save` theirs of ours."""
    def read(keys: Keys, values: Values) -> None:
        usual = default(values) if callable(default) else default
        value = keys.positive(key, usual) if kind is int else keys.take(key, KINDS.get(kind, kind), usual)
        value = load(float(value) if kind is float and value is not None else value)
        values.update(dict.fromkeys(places, value))
    return Entry(key, read, lambda pieces: {key: save(pieces.at(places[0]))})


def named(key: str, place: str, names: Mapping[str, str], back: Mapping[str, str], default: Any = ...) -> Entry:
    """A key whose value is a word: `names` are ours by theirs, `back` theirs by ours. Raises InputError for others."""
    def read(keys: Keys, values: Values) -> None:
        values[place] = word(keys, key, names, default)

    def write(pieces: Pieces) -> dict[str, Any]:
        if pieces.at(place) not in back:
            raise InputError(f"this layout has no {key} for {pieces.at(place)}")
        return {key: back[pieces.at(place)]}
    return Entry(key, read, write)


def word(keys: Keys, key: str, names: Mapping[str, str], default: Any = ...) -> str:
    found = keys.take(key, str, default)
    if found not in names:
        raise InputError(f"{keys.where}: {key} should be one of {', '.join(names)}, not {found!r}")
    return names[found]


def pair(key: str, read: Callable[[Keys, Values], Mapping[str, Any] | None],
         write: Callable[[Any], Mapping[str, Any]] = lambda pieces: {}) -> Entry:
    """Several keys that only make sense together: `read` gives values by place, `write` the keys."""
    return Entry(key, lambda keys, values: values.update(read(keys, values) or {}), write)


def always(**given: Any) -> Entry:
    """Sets values that a family has without a key: by place, with __ for the dot; a value may be a function of those
    read before."""
    places = {place.replace("__", "."): value for place, value in given.items()}

    def read(keys: Keys, values: Values) -> None:
        for place, value in places.items():
            values[place] = value(values) if callable(value) and not isinstance(value, type) else value
    return Entry(" ".join(places), read)


def unread(*keys: str) -> Entry:
    """Keys that change nothing in a forward pass."""
    return Entry(" ".join(keys), lambda given, values: [given.left.pop(key, None) for key in keys] and None)


def expected(**wanted: Any) -> Entry:
    """Keys that may have one value only. Raises InputError for another."""
    def read(keys: Keys, values: Values) -> None:
        for name, value in wanted.items():
            value = value(values) if callable(value) else value
            given = keys.take(name, type(value), value)
            if given != value:
                raise InputError(f"{keys.where}: {name} should be {value!r}, not {given!r}")
    return Entry(" ".join(wanted), read)


def silent(entry: Entry) -> Entry:
    """A field that is read, and not written: the class behind this layout does not know it."""
    return replace(entry, write=lambda pieces: {})


def extend(entries: Iterable[Entry], *more: Entry) -> tuple[Entry, ...]:
    """A list with further fields, of which those with a known key take its place."""
    new = {entry.key: entry for entry in more}
    kept = [new.pop(entry.key, entry) for entry in entries]
    return (*kept, *new.values())


def gather(entries: Iterable[Entry], keys: Keys) -> Values:
    """The values of a config, field by field."""
    values = Values()
    for entry in entries:
        entry.read(keys, values)
    return values


def spell(entries: Iterable[Entry], pieces: Pieces) -> dict[str, Any]:
    """The keys of a config, field by field."""
    config: dict[str, Any] = {}
    for entry in entries:
        config.update(entry.write(pieces))
    return config
