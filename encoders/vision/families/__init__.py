"""Checkpoint layouts of every kind of encoder, told apart by their files and never by a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Families
from mm.checkpoint.tables import IDENTITY
from mm.errors import InputError

from ...audio.spectrogram import Spectrogram
from ...spec import CLIPSpec, ViTSpec
from ..flex import FlexPreprocess
from ..image import Preprocess
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


FAMILIES = Families({"clip": "CLIP", "vit": "ViT"}, {
    "clip": (own("clip", CLIPSpec), HF_CLIP, HF_SIGLIP, OPEN_CLIP, OPEN_CLIP_TIMM),
    "vit": (own("vit", ViTSpec), HF_DINO, HF_VIT, TIMM_VIT, TIMM_EVA, TIMM_NAFLEX),
}, ("model*.safetensors", "open_clip_*.safetensors", "pytorch_model*.bin", "open_clip_*.bin"))
