"""Mimi's checkpoint layouts, told apart by their files and never by a name."""

from __future__ import annotations

from mm.checkpoint.family import Families, own_family

from ..spec import MimiSpec

HF, KYUTAI = "mm.codecs.families.hf:", "mm.codecs.families.kyutai:"
FAMILIES = Families({"mimi": "Mimi"}, {
    "mimi": (own_family("mimi", MimiSpec), HF + "HF", HF + "HF_HALVES", KYUTAI + "KYUTAI", KYUTAI + "KYUTAI_MEMORY")},
    ("tokenizer-*.safetensors", "mimi-*.safetensors", "model*.safetensors", "pytorch_model*.bin"),
    {("mimi", ".safetensors"): KYUTAI + "read_file"})
