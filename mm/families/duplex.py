"""Checkpoint layouts of duplex models."""

from __future__ import annotations

from mm import checkpoint
from mm.families.hf_moshi import HF_MOSHI
from mm.families.moshi import KYUTAI, read_file
from mm.family import Families, Family
from mm.spec import DuplexSpec
from mm.tables import IDENTITY

OWN = Family(
    layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), has_text=True,
    files=lambda config, extras: {checkpoint.CONFIG: config}, table=lambda spec, names: IDENTITY,
    recognise=lambda config: config.get("family") == "duplex", from_spec=lambda spec: checkpoint.pack("duplex", spec),
    to_spec=lambda config, where: checkpoint.unpack(config, DuplexSpec, where))
FAMILIES = Families({"duplex": "duplex model"}, {"duplex": (OWN, KYUTAI, HF_MOSHI)},
                    ("model*.safetensors", "hibiki-*.safetensors", "dsm_*.safetensors", "pytorch_model*.bin"),
                    {("duplex", ".safetensors"): read_file})
