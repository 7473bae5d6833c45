"""Weights that ship in the package."""

from __future__ import annotations

from pathlib import Path

from mm.errors import InputError


def stories260k() -> Path:
    """The directory of a language model of 260 thousand weights that tells children's stories (llama2.c, MIT)."""
    return Path(__file__).parent / "stories260k"


def emoji_clip() -> Path:
    """The directory of the small CLIP trained on emoji by `mm train clip --config clip_emoji.yaml`.

    Raises InputError when this installation lacks it.
    """
    return whole("emoji_clip", "mm train clip --config clip_emoji.yaml")


def codec_small() -> Path:
    """The directory of the small codec trained on speech by `mm train codec --config codec_small.yaml`.

    Raises InputError when this installation lacks it.
    """
    return whole("codec_small", "mm train codec --config codec_small.yaml")


def duplex_small() -> Path:
    """The directory of the small duplex model trained by `mm train duplex --config duplex_small.yaml`.

    Raises InputError when this installation lacks it.
    """
    return whole("duplex_small", "mm train duplex --config duplex_small.yaml")


def whole(name: str, command: str) -> Path:
    path = Path(__file__).parent / name
    if not (path / "model.safetensors").is_file():
        raise InputError(f"the shipped weights are not at {path}: install the package again, or train them with "
                         f"`{command}`")
    return path


def shipped(name: str | Path) -> str | Path:
    """The directory behind the name of shipped weights; any other name as it is."""
    return SHIPPED[name]() if str(name) in SHIPPED and not Path(name).exists() else name


SHIPPED = {"stories260k": stories260k, "codec_small": codec_small,
           "duplex_small": duplex_small}  # what commands call them
