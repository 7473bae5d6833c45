"""Specs as plain dataclasses that check themselves, and their way through JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from mm.errors import InputError


def spec(cls: type) -> type:
    """A frozen, keyword-only dataclass that can be written to JSON and read back by its class name.

    Fields are checked against their annotations first, then by the class's own `__post_init__`.
    """
    further = cls.__dict__.get("__post_init__")

    def check(self: Any) -> None:
        for name, kind in field_types(cls).items():
            value = getattr(self, name)
            require(fits(value, kind), f"{value!r} is not a valid {cls.__name__}.{name}")
        if further is not None:
            further(self)

    cls.__post_init__ = check
    cls = dataclass(frozen=True, kw_only=True)(cls)
    assert cls.__name__ not in SPECS, f"two specs are called {cls.__name__}"
    SPECS[cls.__name__] = cls
    return cls


SPECS: dict[str, type] = {}
# Names that version 0.1 wrote. Its files still open, and its names are those that a fingerprint is made of, so that
# an index or a file of codes goes on to know the model that wrote it.
FIRST_NAMES = {"Window": "Sight", "window": "sight"}
TODAY = {first: today for today, first in FIRST_NAMES.items()}


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(sentence)


def require_rates(settings: Any, *names: str) -> None:
    for name in names:
        rate = getattr(settings, name)
        require(0.0 <= rate < 1.0, f"{type(settings).__name__}.{name} must lie in [0, 1), not {rate}")


@cache
def field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` has the annotated type `kind` (unions, literals and tuples included; an int serves as float)."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if kind in (Any, None, type(None)):
        return kind is Any or value is None
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float))
    return isinstance(value, kind)


def to_data(value: Any, names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A spec as plain dicts and lists; each dict names its class and leaves out defaults. `names` replaces some names
    of classes and fields."""
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        fields = {names.get(f.name, f.name): to_data(getattr(value, f.name), names) for f in dataclasses.fields(value)
                  if f.default is dataclasses.MISSING or getattr(value, f.name) != f.default}
        return {"is": names.get(kind, kind), **fields}
    if isinstance(value, list | tuple):
        return [to_data(item, names) for item in value]
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value  # equal specs are written alike


def from_data(data: Any, where: str = "spec") -> Any:
    """The spec that `to_data` wrote. Unknown classes, fields or values raise `InputError` that names the place."""
    if isinstance(data, list):
        return tuple(from_data(item, f"{where}[{i}]") for i, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    name = str(data.get("is"))
    cls = SPECS.get(TODAY.get(name, name))
    require(cls is not None, f"{where}: {data.get('is')!r} is not a kind of spec")
    kinds = field_types(cls)
    given = {TODAY.get(key, key): value for key, value in data.items() if key != "is"}
    unknown = sorted(set(given) - set(kinds))
    require(not unknown, f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    values = {key: from_data(value, f"{where}.{key}") for key, value in given.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    require(not missing, f"{where}: {cls.__name__} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that name a spec."""
    return hashlib.sha256(json.dumps(to_data(value, FIRST_NAMES), sort_keys=True).encode()).hexdigest()[:16]


def to_json(value: Any) -> str:
    return json.dumps(to_data(value), indent=1)


def from_json(text: str) -> Any:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"a spec should be JSON: {error}") from None
    return from_data(data)
