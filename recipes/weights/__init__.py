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
    path = Path(__file__).parent / "emoji_clip"
    if not (path / "model.safetensors").is_file():
        raise InputError(f"the shipped weights are not at {path}: install the package again, or train them with "
                         "`mm train clip --config clip_emoji.yaml`")
    return path


SHIPPED = {"stories260k": stories260k}  # what commands call them
