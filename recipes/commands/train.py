"""`mm train KIND`: settings from a YAML file and from dotted options, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path
from typing import Any

from mm.errors import InputError

KINDS = {  # what trains, the class of its settings, what it is
    "clip": ("mm.recipes.clip.fit:fit", "mm.recipes.train.settings:ClipJob",
             "a CLIP from pairs of pictures and captions"),
    "vit": ("mm.recipes.vit.fit:fit", "mm.recipes.vit.settings:VitJob",
            "a classifier from pictures in classes, from scratch or from any ViT"),
    "tokenizer": ("mm.recipes.lm.tokenizer:fit", "mm.recipes.lm.tokenizer_settings:TokenizerJob",
                  "a byte-level BPE tokenizer from a corpus"),
    "lm": ("mm.recipes.lm.fit:fit", "mm.recipes.lm.settings:LmJob",
           "a language model on texts or conversations, from scratch or from a checkpoint"),
    "duplex": ("mm.recipes.duplex.fit:fit", "mm.recipes.duplex.settings:DuplexJob",
               "a duplex model on stereo conversations with aligned words, from scratch or from a checkpoint"),
    "codec": ("mm.recipes.codec.fit:fit", "mm.recipes.codec.settings:CodecJob",
              "a neural codec from sounds, from scratch or from a checkpoint"),
}
CONFIGS = Path(__file__).parent.parent / "configs"


def train(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mm train KIND [--config FILE] [--NAME VALUE ...]\n")
        print("\n".join(f"  {kind:<10}{text}" for kind, (*_, text) in KINDS.items()))
        return 0
    if argv[0] not in KINDS:
        raise InputError(f"there is nothing to train called {argv[0]!r}; there is {', '.join(KINDS)}")
    fit, settings, _ = KINDS[argv[0]]
    job = parse(imported(settings), f"mm train {argv[0]}", argv[1:])
    imported(fit)(job)
    return 0


def imported(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def parse(settings: type, prog: str, argv: list[str]) -> Any:
    """An instance of the dataclass from `--config FILE` (a path, or the name of one that is shipped) and options such
    as `--data.path FILE`, the later ones winning. Raises InputError."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, description=(settings.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file of settings: a path, or " + ", ".join(shipped()))
    parser.add_class_arguments(settings)
    explain(parser, settings)
    try:
        values = parser.parse_args([config_path(argv, i) for i in range(len(argv))])
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from None
    try:
        made = parser.instantiate(values)
    except ValueError as error:  # what an optional group of settings refuses comes wrapped
        raise (error.__cause__ if isinstance(error.__cause__, InputError) else error) from None
    return settings(**{field.name: made[field.name] for field in dataclasses.fields(settings)})


def explain(parser: Any, settings: type) -> None:
    """Puts what the docstrings of the dataclasses say as "name: what it is" beside the options."""
    for action in parser._actions:
        *path, name = action.dest.split(".")
        owner = settings
        for part in path:
            owner = typing.get_type_hints(owner).get(part) if dataclasses.is_dataclass(owner) else None
        told = told_fields(owner) if dataclasses.is_dataclass(owner) else {}
        if name in told and not action.help:
            action.help = told[name].replace("%", "%%")


def told_fields(owner: type) -> dict[str, str]:
    """What docstrings, those of the parents too, say of each field, up to the next one; "a, b and c: ..." is said of
    all three."""
    names, told = "|".join(field.name for field in dataclasses.fields(owner)), {}
    for kind in reversed(owner.__mro__):
        text = " ".join((kind.__doc__ or "").split())
        parts = re.split(rf"(?:^|(?<=[.);] ))((?:(?:{names})(?:, | and ))*(?:{names})): ", text)
        for group, what in zip(parts[1::2], parts[2::2], strict=True):
            told |= dict.fromkeys(re.split(", | and ", group), what.strip(" ;"))
    return told


def shipped() -> list[str]:
    return sorted(file.name for file in CONFIGS.glob("*.yaml"))


def config_path(argv: list[str], i: int) -> str:
    """Argument i, made a path where it names a shipped configuration."""
    option, equals, value = argv[i].partition("=")
    if option == "--config" and equals:
        return f"--config={found(value)}"
    return found(argv[i]) if i and argv[i - 1] == "--config" else argv[i]


def found(name: str) -> str:
    own = CONFIGS / Path(name).with_suffix(".yaml").name
    return str(own) if not Path(name).exists() and own.exists() and Path(name).parent == Path() else name


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
