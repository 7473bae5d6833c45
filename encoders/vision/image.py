"""Pictures of any kind to RGB, and RGB to the pixels that a checkpoint was trained on."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm.checkpoint.files import Folder
from mm.errors import InputError
from mm.spec.schema import require, spec

from . import preprocess_files as files
from .preprocess_files import CLIP_MEAN, CLIP_STD, FILTERS

Source = str | os.PathLike | bytes | IO[bytes] | Image.Image | np.ndarray
LARGE = 1 << 25  # pixels; a larger intermediate picture is never made, only the part of it that is kept


def read_image(source: Source) -> Image.Image:
    """A picture as RGB, upright, its transparent parts on white, 16-bit values scaled, the first frame if it moves.

    source: a path, bytes, an open file, a PIL image, or an array (h, w[, 1 | 3 | 4]) of uint8, uint16, bool or floats
    from 0 to 1. Raises InputError that names the file for anything that is no whole picture.
    """
    name = _name(source)
    try:
        if isinstance(source, np.ndarray):
            return _upright_rgb(_from_array(source))
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(_file(source)) as image:
            return _upright_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: too large a picture ({error})") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Exception as error:  # decoders raise anything on damaged data: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{name}: the picture cannot be decoded ({error})") from None


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "filename", None) or getattr(source, "name", None) or "image")


def _file(source: Source) -> Any:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        return source
    raise InputError(f"expected a path, bytes, a file, a PIL image or an array, got {type(source).__name__}")


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"the picture is {image.width} x {image.height} pixels")
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_array(_deep(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep(pixels: np.ndarray) -> np.ndarray:
    """The values of a PIL image deeper than 8 bits: integers are 16-bit, floats run to 1 or to 255."""
    if pixels.dtype.kind == "f":
        return pixels / 255 if pixels.max() > 1 else pixels
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"integer pixels run from {pixels.min()} to {pixels.max()}, expected 0 to 65535")
    return pixels.astype(np.uint16)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim not in (2, 3) or pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"an array of shape {pixels.shape}, expected (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)")
    if 0 in pixels.shape:
        raise InputError(f"an empty array of shape {pixels.shape}")
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels.astype(np.uint32) + 128) // 257
    elif pixels.dtype == bool:
        pixels = pixels * 255
    elif pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN as well
            raise InputError(f"float pixels run from {pixels.min():g} to {pixels.max():g}, expected 0 to 1")
        pixels = np.rint(pixels * 255)
    elif pixels.dtype != np.uint8:
        raise InputError(f"pixels are {pixels.dtype}, expected uint8, uint16, bool or float")
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


@spec
class Preprocess:
    """A picture to (3, h, w) float32: resize, crop from the middle, rescale, normalise.

    `resize` brings the shortest side, the longest, or both ("squash") to `edge` (None: `size`); what `size` then lacks
    is filled with the grey `fill`. `crop` says how an odd margin is halved: as torchvision ("round") or as
    transformers ("floor") does.
    """

    size: tuple[int, ...]
    resize: Literal["shortest", "longest", "squash", "none"] = "shortest"
    edge: tuple[int, ...] | None = None
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    crop: Literal["round", "floor"] = "round"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fill: int = 0
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        for name, pair in (("size", self.size), ("edge", self.edge or self.size)):
            require(len(pair) == 2 and min(pair) > 0, f"Preprocess.{name} must be (height, width), not {pair}")
        for name, three in (("mean", self.mean), ("std", self.std)):
            require(len(three) == 3 and all(map(math.isfinite, three)) and (name == "mean" or 0 not in three),
                    f"Preprocess.{name} must be three finite numbers, none of std 0, not {three}")
        require(0 <= self.fill <= 255, f"Preprocess.fill must lie in 0 to 255, not {self.fill}")

    def __call__(self, image: Source) -> Tensor:
        """One picture, whatever `read_image` takes -> (3, h, w)."""
        pixels = np.asarray(self.cut(read_image(image)))
        table = _normalised(self.rescale, self.mean, self.std)
        return torch.from_numpy(np.stack([table[c].take(pixels[..., c]) for c in range(3)]))

    def batch(self, images: Iterable[Source]) -> Tensor:
        """Pictures -> (B, 3, h, w)."""
        rows = [self(image) for image in images]
        return torch.stack(rows) if rows else torch.empty(0, 3, *self.size)

    def cut(self, image: Image.Image) -> Image.Image:
        """RGB of any size to RGB of `size`, resized and cropped or filled, values untouched."""
        height, width = self.resized(image.height, image.width)
        top, left = self._margin(height - self.size[0]), self._margin(width - self.size[1])
        if height * width > LARGE:
            image, top, left = self._part(image, (height, width), (top, left))
        elif (height, width) != (image.height, image.width):
            image = image.resize((width, height), FILTERS[self.interpolation])
        if image.size == (self.size[1], self.size[0]):
            return image
        canvas = Image.new("RGB", (self.size[1], self.size[0]), (self.fill,) * 3)
        canvas.paste(image, (-left, -top))
        return canvas

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) after the resize and before the crop."""
        edge = self.edge or self.size
        if self.resize == "none":
            return height, width
        if self.resize == "squash":
            return edge
        if self.resize == "shortest" and edge[0] == edge[1]:  # torchvision and transformers cut the fraction off
            short, long = sorted((height, width))
            long = int(edge[0] * long / short)
            return (edge[0], long) if height < width else (long, edge[0])
        pick = min if self.resize == "shortest" else max
        ratio = pick(height / edge[0], width / edge[1])
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _margin(self, extra: int) -> int:
        if self.crop == "floor":
            return extra // 2
        return round(extra / 2) if extra > 0 else -(-extra // 2)

    def _part(self, image: Image.Image, whole: tuple[int, int], start: tuple[int, int]
              ) -> tuple[Image.Image, int, int]:
        """The part of a resized picture that the crop keeps, and the crop's start in it: for a sliver, whose whole
        would not fit into memory. Equal to the whole's up to rounding."""
        first = [max(0, at) for at in start]
        last = [min(full, at + size) for full, at, size in zip(whole, start, self.size, strict=True)]
        scale = image.height / whole[0], image.width / whole[1]
        box = (first[1] * scale[1], first[0] * scale[0], last[1] * scale[1], last[0] * scale[0])
        part = image.resize((last[1] - first[1], last[0] - first[0]), FILTERS[self.interpolation], box=box)
        return part, start[0] - first[0], start[1] - first[1]

    @classmethod
    def from_files(cls, folder: str | Path, size: tuple[int, int] | None = None) -> Preprocess:
        """The preprocessing that a checkpoint's directory describes; where it says nothing, CLIP's for pictures of
        `size`. Raises InputError for a file that is broken or asks for something else."""
        path, found = files.read_settings(Folder.of(folder))
        require("size" in found or size is not None, f"{folder}: no {' or '.join(files.READERS)} tells a picture size")
        try:
            return cls(**{"size": size, **found})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_mm(self) -> dict[str, Any]:
        """The content of a preprocess.json, which says everything."""
        return asdict(self)

    def to_hf(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json; an InputError where transformers has no such preprocessing."""
        return files.to_hf(vars(self))

    def to_open_clip(self) -> dict[str, Any]:
        """The `preprocess_cfg` of an open_clip_config.json; an InputError where open_clip has no such preprocessing."""
        return files.to_open_clip(vars(self))

    def to_timm(self) -> dict[str, Any]:
        """The `pretrained_cfg` entries of a timm config.json; an InputError where timm has no such preprocessing."""
        return files.to_timm(vars(self))


@lru_cache(maxsize=32)
def _normalised(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256) float32: what each value of each channel becomes."""
    values = (np.arange(256) * rescale).astype(np.float32)
    return np.stack([(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
