"""Pictures at their own aspect and size (NaFlex): a batch of patches, padded to one length."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mm.errors import InputError
from mm.spec.schema import require, spec
from mm.tree import register

from ..spec import Patches
from .image import Preprocess, Source, read_image
from .preprocess_files import FILTERS, HF_SILENT

HF_NAMES = ("preprocessor_config.json", "processor_config.json")
HF_DEFAULTS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "max_num_patches": 256, "resample": 2,
               "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "rescale_factor": 1 / 255}


@dataclass(frozen=True)
class Flex:
    """Pictures of several sizes as one batch. patches: (B, N, ph * pw * C), each patch row by row with its channels
    last, padded at the end. sizes: B pairs (rows, columns) of patches: plain numbers, so that shapes are known."""

    patches: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def real(self) -> Tensor:
        """(B, N) bool: the patches that are not padding."""
        counts = torch.tensor([h * w for h, w in self.sizes], device=self.patches.device)
        return torch.arange(self.patches.shape[1], device=self.patches.device) < counts[:, None]

    def to(self, *args: object, **kwargs: object) -> Flex:
        return Flex(self.patches.to(*args, **kwargs), self.sizes)


register(Flex, meta=("sizes",))


def flex_batch(pictures: Sequence[Tensor], patches: Patches, length: int | None = None) -> Flex:
    """Normalised pictures, each (C, h, w) with sides that are multiples of the patch -> one batch of patches, padded
    with zeros to `length` (None: the longest). Raises InputError that names the picture that does not fit."""
    ph, pw = patches.size
    rows, sizes = [], []
    for i, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[0] != patches.channels:
            raise InputError(f"picture {i} should be ({patches.channels}, h, w), not of shape {tuple(picture.shape)}")
        height, width = picture.shape[1:]
        if not height or not width or height % ph or width % pw:
            raise InputError(f"picture {i} of {height} x {width} pixels is not a whole number of {ph} x {pw} patches")
        cut = picture.unflatten(2, (-1, pw)).unflatten(1, (-1, ph)).permute(1, 3, 2, 4, 0)
        rows.append(cut.flatten(2).flatten(0, 1))
        sizes.append((height // ph, width // pw))
    if not rows:
        raise InputError("a batch needs at least one picture")
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise InputError(f"a picture has {longest} patches, and the batch has room for {length}")
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row, own in zip(padded, rows, strict=True):
        row[: len(own)] = own
    return Flex(padded, tuple(sizes))


@spec
class FlexPreprocess:
    """A picture to pixels that keep its aspect: the largest size whose sides are multiples of `patch` pixels and that
    has at most `tokens` patches (SigLIP 2, Tschannen et al., 2025)."""

    patch: int = 16
    tokens: int = 256
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        require(min(self.patch, self.tokens) > 0, "FlexPreprocess.patch and tokens must be positive")

    def __call__(self, image: Source) -> Tensor:
        """One picture, whatever `read_image` takes -> (3, h, w)."""
        image = read_image(image)
        size = self.size(image.height, image.width)
        plain = Preprocess(size=size, resize="squash", interpolation=self.interpolation, mean=self.mean, std=self.std,
                           rescale=self.rescale)
        return plain(image)

    def batch(self, images: Iterable[Source]) -> Flex:
        """Pictures -> a batch padded to `tokens` patches."""
        return self.collate([self(image) for image in images])

    def collate(self, pictures: Sequence[Tensor]) -> Flex:
        """Pictures that are pixels already -> a batch padded to `tokens` patches."""
        return flex_batch(pictures, Patches(size=(self.patch, self.patch)), self.tokens)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) in pixels, found by halving the interval of scales as the reference does."""
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            h, w = (self.side(scale, side) for side in (height, width))
            low, high = (scale, high) if (h // self.patch) * (w // self.patch) <= self.tokens else (low, scale)
        return self.side(low, height), self.side(low, width)

    def side(self, scale: float, pixels: int) -> int:
        return max(self.patch, math.ceil(pixels * scale / self.patch) * self.patch)

    @classmethod
    def from_files(cls, folder: str | Path, patch: int) -> Self:
        """What a directory says, or SigLIP 2's own. Raises InputError for a broken file."""
        folder = Path(folder)
        path = next((folder / name for name in HF_NAMES if (folder / name).is_file()), None)
        if path is None:
            return cls(patch=patch)
        try:
            content = json.loads(path.read_text("utf-8"))
            return cls.from_hf(content.get("image_processor", content), patch)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a readable preprocessing file ({error})") from None

    @classmethod
    def from_hf(cls, content: Mapping[str, Any], patch: int) -> Self:
        """From what transformers' Siglip2ImageProcessor wrote."""
        given = HF_DEFAULTS | {"patch_size": patch} | {k: v for k, v in content.items() if v is not None}
        unknown = [k for k, v in given.items() if v and k not in {*HF_DEFAULTS, *HF_SILENT, "patch_size"}]
        off = [name for name in ("do_resize", "do_rescale", "do_normalize") if not given[name]]
        kind = given.get("image_processor_type", "Siglip2ImageProcessor")
        if unknown or off or not kind.startswith("Siglip2"):
            odd = unknown[0] if unknown else off[0] if off else "image_processor_type"
            raise InputError(f"{odd} = {given[odd]!r} is not known for pictures at their own aspect")
        filters = {number: name for name, number in FILTERS.items()}
        return cls(patch=given["patch_size"], tokens=given["max_num_patches"],
                   interpolation=filters[given["resample"]], mean=tuple(given["image_mean"]),
                   std=tuple(given["image_std"]), rescale=given["rescale_factor"])

    def to_mm(self) -> dict[str, Any]:
        return asdict(self)

    def to_timm(self) -> dict[str, Any]:
        """The `pretrained_cfg` entries of a timm config.json: a picture of as many patches stands for `tokens`."""
        if not math.isclose(self.rescale, 1 / 255):
            raise InputError(f"preprocessing: rescale = {self.rescale} cannot be written for timm")
        rows = next(n for n in range(math.isqrt(self.tokens), 0, -1) if self.tokens % n == 0)
        return {"input_size": [3, rows * self.patch, self.tokens // rows * self.patch], "crop_pct": 1.0,
                "crop_mode": "center", "interpolation": self.interpolation, "mean": list(self.mean),
                "std": list(self.std)}

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of a Siglip2ImageProcessor."""
        return {"image_processor_type": "Siglip2ImageProcessor", "do_resize": True, "do_rescale": True,
                "do_normalize": True, "do_convert_rgb": True, "patch_size": self.patch, "max_num_patches": self.tokens,
                "resample": FILTERS[self.interpolation], "image_mean": list(self.mean), "image_std": list(self.std),
                "rescale_factor": self.rescale}
