"""Mimi's checkpoint layouts, told apart by their files and never by a name."""

from __future__ import annotations

from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families, Family
from mm.checkpoint.tables import IDENTITY

from ..spec import MimiSpec
from .hf import HF, HF_HALVES
from .kyutai import KYUTAI, KYUTAI_MEMORY, is_codec, read_file

__all__ = ["FAMILIES", "is_codec"]


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {checkpoint.CONFIG: config}


OWN = Family(layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), files=files,
             recognise=lambda config: config.get("family") == "mimi", table=lambda spec, names: IDENTITY,
             to_spec=lambda config, where: checkpoint.unpack(config, MimiSpec, where),
             from_spec=lambda spec: checkpoint.pack("mimi", spec))
FAMILIES = Families({"mimi": "Mimi"}, {"mimi": (OWN, HF, HF_HALVES, KYUTAI, KYUTAI_MEMORY)},
                    ("tokenizer-*.safetensors", "mimi-*.safetensors", "model*.safetensors", "pytorch_model*.bin"),
                    {("mimi", ".safetensors"): read_file})
