"""Weights that ship in the package: the directory of each, for those who want the files."""

from __future__ import annotations

from pathlib import Path

from mm.checkpoint.door import shipped


def stories260k() -> Path:
    """A language model of 260 thousand weights that tells children's stories (llama2.c, MIT)."""
    return shipped("stories260k")


def emoji_clip() -> Path:
    """The small CLIP trained on emoji by `mm train clip --config clip_emoji.yaml`."""
    return shipped("emoji_clip")


def codec_small() -> Path:
    """The small codec trained on speech by `mm train codec --config codec_small.yaml`."""
    return shipped("codec_small")


def duplex_small() -> Path:
    """The small duplex model trained by `mm train duplex --config duplex_small.yaml`."""
    return shipped("duplex_small")
