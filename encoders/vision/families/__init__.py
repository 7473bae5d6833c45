"""Checkpoint layouts of every kind of encoder, told apart by their files and never by a name."""

from __future__ import annotations

from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families, Family, own_family
from mm.checkpoint.files import Folder
from mm.errors import InputError

from ...audio.spectrogram import Spectrogram
from ...spec import CLIPSpec, ViTSpec
from ..flex import FlexPreprocess
from ..image import Preprocess
from .common import pictures

PREPROCESS, HERE = "preprocess.json", "mm.encoders.vision.families."


def own(kind: str, settings: type) -> Family:
    """This package's own layout."""
    def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
        about = {"labels": list(extras.labels)} if extras.labels else {}
        beside = {PREPROCESS: extras.preprocess.to_mm()} if extras.preprocess else {}
        return {**beside, checkpoint.CONFIG: config | about}
    return own_family(kind, settings, has_text=kind == "clip", files=files, preprocess=preprocess,
                      labels=lambda config: tuple(config.get("labels", ())))


def preprocess(folder: Folder, settings: CLIPSpec | ViTSpec) -> Preprocess | FlexPreprocess | Spectrogram:
    """What a directory's preprocess.json says of pictures, pictures at their own aspect, or sounds."""
    content = folder.json(PREPROCESS)
    try:
        if "frames" in content:
            return Spectrogram(**content)
        if "tokens" in content:
            return FlexPreprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
        return pictures(folder, settings)
    except TypeError as error:
        raise InputError(f"{folder / PREPROCESS}: {error}") from None


FAMILIES = Families({"clip": "CLIP", "vit": "ViT"}, {
    "clip": (own("clip", CLIPSpec), *(HERE + place for place in (
        "hf_clip:HF_CLIP", "hf_siglip:HF_SIGLIP", "open_clip:OPEN_CLIP", "open_clip_timm:OPEN_CLIP_TIMM"))),
    "vit": (own("vit", ViTSpec), *(HERE + place for place in (
        "hf_dino:HF_DINO", "hf_vit:HF_VIT", "timm_vit:TIMM_VIT", "timm_eva:TIMM_EVA", "timm_naflex:TIMM_NAFLEX"))),
}, ("model*.safetensors", "open_clip_*.safetensors", "pytorch_model*.bin", "open_clip_*.bin"))
