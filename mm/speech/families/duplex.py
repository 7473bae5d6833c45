"""Checkpoint layouts of models that speak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families, Family, Opened
from mm.checkpoint.tables import IDENTITY
from mm.spec import CSMSpec, DuplexSpec
from mm.speech.families.csm import HF_CSM
from mm.speech.families.hf_moshi import HF_MOSHI
from mm.speech.families.moshi import KYUTAI, read_file

GENERATION = "generation"  # what Kyutai's configs say of sampling and of speech to and from text


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    told = {name: value for name, value in extras.generation.items() if name.endswith("_config")}
    return {checkpoint.CONFIG: config | ({GENERATION: told} if told else {})}


def complete(folder: Path, opened: Opened) -> Opened:
    told = checkpoint.read_json(folder / checkpoint.CONFIG).get(GENERATION) or {}
    return replace(opened, extras=replace(opened.extras, generation=told))


def own(kind: str, settings: type) -> Family:
    return Family(
        layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), has_text=True, files=files,
        complete=complete, table=lambda spec, names: IDENTITY,
        recognise=lambda config: config.get("family") == kind, from_spec=lambda spec: checkpoint.pack(kind, spec),
        to_spec=lambda config, where: checkpoint.unpack(config, settings, where))


FAMILIES = Families({"duplex": "duplex model", "csm": "CSM"}, {
    "duplex": (own("duplex", DuplexSpec), KYUTAI, HF_MOSHI), "csm": (own("csm", CSMSpec), HF_CSM)},
    ("model*.safetensors", "hibiki-*.safetensors", "dsm_*.safetensors", "pytorch_model*.bin",
     "consolidated.safetensors", "lora.safetensors"),
    {("duplex", ".safetensors"): read_file})
