"""The files in which checkpoints describe their preprocessing: ours, transformers', open_clip's and timm's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.checkpoint.files import Folder
from mm.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
FIELDS = {"size", "resize", "edge", "interpolation", "crop", "mean", "std", "fill", "rescale"}
HF_SILENT = {  # keys of a preprocessor_config.json that change no pixel of an RGB picture
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys",
    "data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square",
    "do_convert_rgb"}
_CLIP = {"do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224,
         "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN,
         "image_std": CLIP_STD, "default_to_square": False}
_SQUASH = {**_CLIP, "size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": None,
           "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "default_to_square": True}
HF_DEFAULTS = {"CLIP": _CLIP, "Bit": _CLIP, "Siglip": _SQUASH, "ViT": {**_SQUASH, "resample": 2},
               "DINOv3ViT": {**_SQUASH, "resample": 2, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
               "DeiT": {**_SQUASH, "size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}}


def read_settings(folder: Folder) -> tuple[Path, dict[str, Any]]:
    """The file that describes the preprocessing, and the fields of `Preprocess` that it gives."""
    for name, reader in READERS.items():
        path = folder / name
        if path.is_file():
            try:
                content = folder.json(name)
            except InputError as error:
                raise InputError(f"{path}: not a readable preprocessing file ({error})") from None
            try:
                return path, reader(content)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise InputError(f"{path}: not a readable preprocessing file ({error})") from None
    return folder.path, {}


def from_mm(content: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocess.json: the fields of `Preprocess` by their names."""
    unknown = sorted(set(content) - FIELDS)
    if unknown or "size" not in content:
        raise InputError(f"{unknown[0]!r} is not a preprocessing setting" if unknown else "size is missing")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessor_config.json of transformers' CLIP, Bit, Siglip, ViT, DeiT or DINOv3 image processor."""
    kind = content.get("image_processor_type", content.get("feature_extractor_type", "CLIPImageProcessor"))
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in HF_DEFAULTS:
        raise InputError(f"image_processor_type {kind}ImageProcessor is not known, only {', '.join(HF_DEFAULTS)}")
    for key, value in content.items():
        if key not in HF_DEFAULTS[kind] and key not in HF_SILENT and value not in (None, False):
            raise InputError(f"{key} = {value!r} changes the pixels in a way that is not known")
    given = HF_DEFAULTS[kind] | {key: value for key, value in content.items() if value is not None}
    crop = _both(given["crop_size"], "crop_size") if given["do_center_crop"] else None
    resize, edge = _hf_resize(given) if given["do_resize"] else ("none", crop)
    if crop is None and resize != "squash":
        raise InputError("do_center_crop is off, so pictures of different shapes would not end up in one size")
    return {"size": crop or edge, "resize": resize, "edge": None if edge == (crop or edge) else edge, "crop": "floor",
            "interpolation": _filter_name(given["resample"]),
            "rescale": float(given["rescale_factor"]) if given["do_rescale"] else 1.0,
            "mean": tuple(given["image_mean"]) if given["do_normalize"] else (0.0,) * 3,
            "std": tuple(given["image_std"]) if given["do_normalize"] else (1.0,) * 3}


def _hf_resize(given: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    size = given["size"]
    if isinstance(size, int):
        return ("squash" if given["default_to_square"] else "shortest"), (size, size)
    if set(size) == {"shortest_edge"}:
        return "shortest", (size["shortest_edge"],) * 2
    return "squash", _both(size, "size")


def _both(size: int | Mapping[str, int], key: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if set(size) != {"height", "width"}:
        raise InputError(f"{key} = {dict(size)} is not known, expected a number, a shortest_edge or height and width")
    return size["height"], size["width"]


def _filter_name(resample: int) -> str:
    names = [name for name, number in FILTERS.items() if number == resample]
    if not names:
        raise InputError(f"resample = {resample!r} is not a filter of Pillow's, 0 to 5")
    return names[0]


def from_open_clip(content: Mapping[str, Any]) -> dict[str, Any]:
    """An open_clip_config.json: its `preprocess_cfg`, and the picture size from its `model_cfg`."""
    given = {key: value for key, value in content.get("preprocess_cfg", {}).items() if value is not None}
    image_size = content.get("model_cfg", {}).get("vision_cfg", {}).get("image_size", given.pop("size", 224))
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    resize, interpolation = given.pop("resize_mode", "shortest"), given.pop("interpolation", "bicubic")
    if interpolation == "random" or resize == "shortest" and size[0] != size[1]:
        interpolation = "bicubic"  # what open_clip does then, whatever the file asks for
    mean, std, fill = given.pop("mean", CLIP_MEAN), given.pop("std", CLIP_STD), given.pop("fill_color", 0)
    given.pop("size", None)
    if given.pop("mode", "RGB") != "RGB" or given:
        raise InputError(f"preprocess_cfg has {given or 'a mode other than RGB'}, which is not known")
    three = [(value,) * 3 if isinstance(value, int | float) else tuple(value) for value in (mean, std)]
    return {"size": size, "resize": resize, "interpolation": interpolation, "mean": three[0], "std": three[1],
            "fill": fill}


def from_timm(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of timm: its `pretrained_cfg`. Any other config.json says nothing about preprocessing."""
    given = content.get("pretrained_cfg", content) if "architecture" in content else {}
    if "input_size" not in given:
        return {}
    size, mode = tuple(given["input_size"][1:]), given.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise InputError(f"crop_mode = {mode!r} is not known, expected center or squash")
    edge = tuple(math.floor(side / (given.get("crop_pct") or 0.875)) for side in size)
    return {"size": size, "resize": "squash" if mode == "squash" else "shortest",
            "edge": None if edge == size else edge, "interpolation": given.get("interpolation") or "bicubic",
            "mean": _three(given.get("mean") or IMAGENET_MEAN), "std": _three(given.get("std") or IMAGENET_STD)}


def _three(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(values) * 3 if len(values) == 1 else tuple(values)


def to_timm(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg` entries of a timm config.json."""
    size, edge = fields["size"], fields["edge"] or fields["size"]
    share = size[0] / edge[0]
    if math.floor(size[0] / share) != edge[0]:
        share = size[0] / (edge[0] + 0.5)
    odd = [f"{name} = {fields[name]}" for name, wrong in (
        ("edge", tuple(math.floor(side / share) for side in size) != tuple(edge)), ("fill", fields["fill"] != 0),
        ("resize", fields["resize"] not in ("shortest", "squash")),
        ("rescale", not math.isclose(fields["rescale"], 1 / 255))) if wrong]
    if odd:
        raise InputError(f"preprocessing: {odd[0]} cannot be written for timm")
    return {"input_size": [3, *size], "crop_pct": share, "interpolation": fields["interpolation"],
            "crop_mode": "squash" if fields["resize"] == "squash" else "center",
            "mean": list(fields["mean"]), "std": list(fields["std"])}


def to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A preprocessor_config.json for transformers' CLIPImageProcessor, which rounds an odd margin down."""
    size, edge, resize = fields["size"], fields["edge"] or fields["size"], fields["resize"]
    if resize == "longest" or resize == "shortest" and edge[0] != edge[1] or fields["fill"] != 0:
        raise InputError(f"preprocessing: resize = {resize!r} to {edge} with fill = {fields['fill']} cannot be written "
                         "for transformers' CLIPImageProcessor")
    return {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": resize != "none",
            "size": _sides(edge) if resize == "squash" else {"shortest_edge": edge[0]},
            "resample": FILTERS[fields["interpolation"]], "do_center_crop": True, "crop_size": _sides(size),
            "do_rescale": True, "rescale_factor": fields["rescale"], "do_normalize": True,
            "image_mean": list(fields["mean"]), "image_std": list(fields["std"])}


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def to_open_clip(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocess_cfg` of an open_clip_config.json; open_clip rounds an odd margin to even."""
    odd = [f"{name} = {fields[name]}" for name, wrong in (
        ("edge", fields["edge"] not in (None, fields["size"])),
        ("resize", fields["resize"] == "none"),
        ("interpolation", fields["interpolation"] not in ("bicubic", "bilinear")),
        ("rescale", not math.isclose(fields["rescale"], 1 / 255))) if wrong]
    if odd:
        raise InputError(f"preprocessing: {odd[0]} cannot be written for open_clip")
    return {"mean": list(fields["mean"]), "std": list(fields["std"]), "interpolation": fields["interpolation"],
            "resize_mode": fields["resize"], "fill_color": fields["fill"]}


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {  # the first that a directory holds counts
    "preprocess.json": from_mm,
    "open_clip_config.json": from_open_clip,
    "preprocessor_config.json": from_hf,
    "processor_config.json": lambda content: from_hf(content["image_processor"]),
    "config.json": from_timm}
