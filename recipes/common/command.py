"""One command line for all commands: a dataclass holds the options of a command, its docstring the help.

A command is a dataclass with a method `run`. Its fields are the options, its `Args:` section their help, their types
and defaults what is accepted; fields made by `argument` are positional, `defaults` are words before the user's
own. Options may be spelled with dashes or underscores.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse.typing import restricted_number_type

from mm.errors import InputError

Port = restricted_number_type("Port", int, [(">=", 0), ("<=", 65535)], docstring="a port from 0 to 65535")
T = TypeVar("T")
# name -> "module:Class", or "module:TABLE" of more commands; a line of help; a function to run instead of `Class.run`
Table = Mapping[str, tuple[str, ...]]
CONFIGS = Path(__file__).parent.parent / "configs"


def argument(default: Any = dataclasses.MISSING, *, many: bool = False) -> Any:
    """A positional field; `many` takes all that follow."""
    factory = {"default_factory": list} if many and default is dataclasses.MISSING else {"default": default}
    return dataclasses.field(metadata={"positional": "+" if many else None}, **factory)


# -------------------------------------------------------------------------------------------- tables of commands
def dispatch(table: Table, prog: str, argv: list[str]) -> int:
    """Run the command that the first word names, by a table. Raises InputError for a word that is not in it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(table, prog))
        return 0
    if argv[0] not in table:
        near = difflib.get_close_matches(argv[0], table, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table)}"
        raise InputError(f"there is no {prog} {argv[0]}: {hint}")
    place, _, *function = table[argv[0]]
    found = imported(place)
    if isinstance(found, Mapping):
        return dispatch(found, f"{prog} {argv[0]}", argv[1:])
    command = parse(found, f"{prog} {argv[0]}", argv[1:])
    return (imported(function[0])(command) if function else command.run()) or 0


def usage(table: Table, prog: str) -> str:
    width = max(map(len, table))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text, *_) in table.items())
    return f"usage: {prog} COMMAND ...\n\n{rows}\n\n`{prog} COMMAND --help` shows the options of each."


def imported(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


# -------------------------------------------------------------------------------------------- one command
def parse(command: type[T], prog: str, argv: list[str]) -> T:
    """An instance of the dataclass from `--config FILE` (a path, or the name of one that ships) and options, the later
    ones winning. Raises InputError for unknown options, missing ones and wrong values."""
    from jsonargparse import ArgumentError, ArgumentParser

    fields = {field.name: field for field in dataclasses.fields(command)}
    positional = [name for name, field in fields.items() if "positional" in field.metadata]
    argv = [*getattr(command, "defaults", ()), *argv]
    description = inspect.getdoc(command).partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=" ".join(description.split()))
    parser.add_argument("--config", action="config", help="a YAML file with any of these options: a path, or "
                        + ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml"))))
    for name in positional:
        add_positional(parser, fields[name], command)
    parser.add_class_arguments(command, skip=set(positional))
    explain(parser, command)
    try:
        values = parser.parse_args(list(normalised(command, argv)))
        made = parser.instantiate(values)
    except ArgumentError as error:
        raise InputError(readable(str(error), parser)) from None
    except ValueError as error:  # an optional group of settings wraps the error that it raises
        raise (error.__cause__ if isinstance(error.__cause__, InputError) else error) from None
    return command(**{name: made[name] for name in fields})


def add_positional(parser: Any, field: dataclasses.Field, command: type) -> None:
    nargs = field.metadata["positional"]
    optional = {} if field.default is dataclasses.MISSING else {"nargs": "?", "default": field.default}
    kind = typing.get_type_hints(command)[field.name]
    if nargs:
        (kind,) = typing.get_args(kind)
        optional = {"nargs": nargs}
    parser.add_argument(field.name, type=kind, metavar=field.name.upper(), **optional)


def normalised(command: type, argv: list[str]) -> Iterator[str]:
    """Options by the names of their fields; a switch without a value is true; several values, or an option that stands
    several times, are one list."""
    hints = typing.get_type_hints(command)
    lists: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            yield from [word, *words]
            break
        if not word.startswith("--"):
            yield word
            continue
        option, equals, value = word[2:].partition("=")
        name = option.replace("-", "_")
        if name == "config" and (equals or words):
            yield f"--config={shipped_config(value if equals else words.pop(0))}"
        elif hints.get(name) is bool and not equals and (not words or words[0] not in ("true", "false")):
            yield f"--{name}=true"
        elif typing.get_origin(hints.get(name)) in (list, tuple) and not (value or "".join(words[:1])).startswith("["):
            lists.setdefault(name, []).extend([value] if equals else taken(words))
        else:
            yield f"--{name}{equals}{value}"
    for name, values in lists.items():
        yield f"--{name}={json.dumps(values) if str in typing.get_args(hints[name]) else '[' + ','.join(values) + ']'}"


def taken(words: list[str]) -> Iterator[str]:
    """The values of an option that takes several, off the front of the words."""
    while words and not (words[0].startswith("-") and not words[0].lstrip("-")[:1].isdigit()):
        yield words.pop(0)


def shipped_config(name: str) -> str:
    own = CONFIGS / Path(name).with_suffix(".yaml").name
    return str(own) if not Path(name).exists() and own.exists() and Path(name).parent == Path() else name


def explain(parser: Any, command: type) -> None:
    """Puts the `Args:` of the dataclasses, inherited ones too, beside the options."""
    for action in parser._actions:
        *path, name = action.dest.split(".")
        owner = command
        for part in path:
            owner = dataclass_in(typing.get_type_hints(owner).get(part)) if owner else None
        if owner and (text := described(owner).get(name)):
            action.help = text.replace("%", "%%")


def dataclass_in(kind: Any) -> type | None:
    """The dataclass of an annotation such as `Lora | None`."""
    return next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)


def described(owner: type) -> dict[str, str]:
    """The help of each field, from the `Args:` of the class and of its parents."""
    from docstring_parser import parse as parse_docstring

    kinds = (kind for kind in reversed(owner.__mro__) if dataclasses.is_dataclass(kind) and kind.__doc__)
    return {one.arg_name: " ".join((one.description or "").split())
            for kind in kinds for one in parse_docstring(kind.__doc__).params}


def readable(message: str, parser: Any) -> str:
    """An error of the parser as one sentence, with the nearest name for an option that is unknown."""
    message = " ".join(message.split())
    names = [option for action in parser._actions for option in action.option_strings]
    unknown = next((word.partition("=")[0] for word in message.split() if word.startswith("--")), None)
    if "nrecognized arguments" in message and unknown:
        near = difflib.get_close_matches(unknown, names, 1)
        return f"there is no option {unknown}" + (f": did you mean {near[0]}?" if near else "")
    return message
