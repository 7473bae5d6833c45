"""The pictures of a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import files
from ..common.files import PictureFile, Walk
from ..data.pictures import ENDINGS

if TYPE_CHECKING:
    from PIL import Image


def walk(folder: str | Path) -> Walk:
    """All pictures under a folder: see `files.walk`."""
    return files.walk(folder, "pictures", ENDINGS, captioned)


def captioned(file: Path, names: set[str], **about: Any) -> PictureFile:
    """A picture that may have a .txt file beside it."""
    beside = file.with_suffix(".txt")
    words = beside.read_text("utf-8", "replace").split() if beside.name in names else []
    return PictureFile(**about, caption=" ".join(words) or None)


def decode(data: bytes, name: str) -> Image.Image:
    """The bytes of a picture as upright RGB. Raises InputError that starts with `name`."""
    from ...encoders.vision.image import read_image

    stream = io.BytesIO(data)
    stream.name = name
    return read_image(stream)
