"""Checkpoint layouts of every kind of encoder, told apart by their files and never by a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm import checkpoint
from mm.errors import InputError
from mm.tables import IDENTITY

from ..audio import Spectrogram
from ..flex import FlexPreprocess
from ..image import Preprocess
from ..spec import CLIPSpec, ViTSpec
from .common import Extras, Family, pictures
from .hf_clip import HF_CLIP
from .hf_dino import HF_DINO
from .hf_siglip import HF_SIGLIP
from .hf_vit import HF_VIT
from .open_clip import OPEN_CLIP
from .open_clip_timm import OPEN_CLIP_TIMM
from .timm_eva import TIMM_EVA
from .timm_naflex import TIMM_NAFLEX
from .timm_vit import TIMM_VIT

PREPROCESS = "preprocess.json"


def own(kind: str, settings: type) -> Family:
    """This package's own layout."""
    def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
        about = {"labels": list(extras.labels)} if extras.labels else {}
        beside = {PREPROCESS: extras.preprocess.to_mm()} if extras.preprocess else {}
        return {**beside, checkpoint.CONFIG: config | about}
    def preprocess(folder: Path, settings: CLIPSpec | ViTSpec) -> Preprocess | FlexPreprocess | Spectrogram:
        path = folder / PREPROCESS
        content = checkpoint.read_json(path) if path.is_file() else {}
        try:
            if "frames" in content:
                return Spectrogram(**content)
            if "tokens" in content:
                return FlexPreprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
            return pictures(folder, settings)
        except TypeError as error:
            raise InputError(f"{path}: {error}") from None
    return Family(
        layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), has_text=kind == "clip",
        recognise=lambda config: config.get("family") == kind, table=lambda spec, names: IDENTITY, files=files,
        preprocess=preprocess,
        to_spec=lambda config, where: checkpoint.unpack(config, settings, where),
        from_spec=lambda spec: checkpoint.pack(kind, spec), labels=lambda config: tuple(config.get("labels", ())))


# By kind of model; a directory that holds several layouts is read as the first, a layout's first family that can hold
# a model writes it.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "clip": (own("clip", CLIPSpec), HF_CLIP, HF_SIGLIP, OPEN_CLIP, OPEN_CLIP_TIMM),
    "vit": (own("vit", ViTSpec), HF_DINO, HF_VIT, TIMM_VIT, TIMM_EVA, TIMM_NAFLEX),
}
WEIGHT_PATTERNS = ("model*.safetensors", "open_clip_*.safetensors", "pytorch_model*.bin", "open_clip_*.bin")


def resolve(name_or_dir: str | Path) -> Path:
    """The directory of a checkpoint, from the hub where it is not on disk. Raises InputError."""
    return checkpoint.resolve(name_or_dir, WEIGHT_PATTERNS)


def kind_of(folder: Path) -> str | None:
    """The kind of model that a directory holds, None where no family knows it."""
    return next((kind for kind in FAMILIES if find(folder, kind)), None)


def find(folder: Path, kind: str) -> Family | None:
    for family in FAMILIES[kind]:
        path = folder / family.config
        if path.is_file() and family.recognise(checkpoint.read_json(path)):
            return family
    return None


def recognise(folder: Path, kind: str) -> Family:
    """The layout of a directory. Raises InputError when it holds another kind of model or none."""
    found = find(folder, kind)
    if found is not None:
        return found
    files = [name for name in dict.fromkeys(family.config for family in FAMILIES[kind]) if (folder / name).is_file()]
    seen = []
    for name in files:
        config = checkpoint.read_json(folder / name)
        named = config.get("model_type") or config.get("family") or config.get("architecture") or "unknown"
        seen.append(f"{name} is of the kind {named}")
    reason = " and ".join(seen) or "there is neither config.json nor open_clip_config.json"
    raise InputError(f"{folder} holds no {NAMES[kind]} checkpoint: {reason}")


NAMES = {"clip": "CLIP", "vit": "ViT"}


def by_layout(kind: str, layout: str) -> tuple[Family, ...]:
    """The families of a kind that write this layout, best first. Raises InputError when there is none."""
    layouts = dict.fromkeys(family.layout for family in FAMILIES[kind])
    if layout not in layouts:
        raise InputError(f"layout should be one of {', '.join(layouts)}, not {layout!r}")
    return tuple(family for family in FAMILIES[kind] if family.layout == layout)


def to_write(kind: str, layout: str, spec: Any) -> tuple[Family, dict[str, Any]]:
    """The first family of a layout that can hold a model, and its config. Raises InputError that says why none can."""
    reasons = []
    for family in by_layout(kind, layout):
        try:
            return family, family.from_spec(spec)
        except InputError as error:
            reasons.append(str(error))
    raise InputError("; nor: ".join(dict.fromkeys(reasons)))
