"""Layouts of codecs' checkpoints, told apart by their files and never by a name."""

from __future__ import annotations

from mm.checkpoint.family import Families, own_family

from ..spec import MimiSpec

MIMI = "mm.codecs.families.mimi:"
FAMILIES = Families(
    {"mimi": "Mimi"}, {"mimi": (own_family("mimi", MimiSpec), MIMI + "LAYOUTS")},
    ("tokenizer-*.safetensors", "mimi-*.safetensors", "model*.safetensors", "pytorch_model*.bin"),
    {("mimi", ".safetensors"): MIMI + "read_file"})
