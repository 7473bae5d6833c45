"""Checkpoint layouts of CLIP, told apart by their files and never by a name."""

from __future__ import annotations

from pathlib import Path

from mm import checkpoint
from mm.errors import InputError
from mm.tables import IDENTITY

from ..spec import CLIPSpec
from .common import Family
from .hf_clip import HF_CLIP
from .open_clip import OPEN_CLIP

KIND = "clip"
MM = Family(
    layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,),
    recognise=lambda config: config.get("family") == KIND,
    to_spec=lambda config, where: checkpoint.unpack(config, CLIPSpec, where),
    from_spec=lambda spec: checkpoint.pack(KIND, spec), table=lambda spec, names: IDENTITY,
    files=lambda config, preprocess, _: {"preprocess.json": preprocess.to_mm(), checkpoint.CONFIG: config})
FAMILIES = (MM, HF_CLIP, OPEN_CLIP)  # a directory that holds several layouts is read as the first
WEIGHT_PATTERNS = ("model*.safetensors", "open_clip_*.safetensors", "pytorch_model*.bin", "open_clip_*.bin")


def recognise(folder: Path) -> Family:
    """The layout of a directory. Raises InputError when its config is of another kind of model or absent."""
    seen = []
    for family in FAMILIES:
        path = folder / family.config
        if path.is_file():
            config = checkpoint.read_json(path)
            if family.recognise(config):
                return family
            kind = config.get("model_type") or config.get("family") or "unknown"
            seen.append(f"{family.config} is of the kind {kind}")
    reason = " and ".join(dict.fromkeys(seen)) or "there is neither config.json nor open_clip_config.json"
    raise InputError(f"{folder} holds no CLIP checkpoint: {reason}")


def by_layout(layout: str) -> Family:
    found = {family.layout: family for family in FAMILIES}
    if layout not in found:
        raise InputError(f"layout should be one of {', '.join(found)}, not {layout!r}")
    return found[layout]
