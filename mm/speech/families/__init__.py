"""Checkpoint layouts of models that speak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families, Opened, own_family
from mm.checkpoint.files import Folder
from mm.spec import CSMSpec, DuplexSpec

GENERATION = "generation"  # settings of sampling and of speech to and from text in Kyutai's configs


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    kept = {name: value for name, value in extras.generation.items() if name.endswith("_config")}
    return {checkpoint.CONFIG: config | ({GENERATION: kept} if kept else {})}


def complete(folder: Folder, opened: Opened) -> Opened:
    given = folder.json(checkpoint.CONFIG).get(GENERATION) or {}
    return replace(opened, extras=replace(opened.extras, generation=given))


OWN = {"has_text": True, "files": files, "complete": complete}
FAMILIES = Families({"duplex": "duplex model", "csm": "CSM"}, {
    "duplex": (own_family("duplex", DuplexSpec, **OWN), "mm.speech.families.moshi:KYUTAI",
               "mm.speech.families.hf_speech:HF_MOSHI"),
    "csm": (own_family("csm", CSMSpec, **OWN), "mm.speech.families.hf_speech:HF_CSM")},
    ("model*.safetensors", "hibiki-*.safetensors", "dsm_*.safetensors", "pytorch_model*.bin",
     "consolidated.safetensors", "lora.safetensors"),
    {("duplex", ".safetensors"): "mm.speech.families.moshi:read_file"})
