"""Checkpoint layouts of models that speak."""

from __future__ import annotations

from mm import checkpoint
from mm.families.csm import HF_CSM
from mm.families.hf_moshi import HF_MOSHI
from mm.families.moshi import KYUTAI, read_file
from mm.family import Families, Family
from mm.spec import CSMSpec, DuplexSpec
from mm.tables import IDENTITY


def own(kind: str, settings: type) -> Family:
    return Family(
        layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), has_text=True,
        files=lambda config, extras: {checkpoint.CONFIG: config}, table=lambda spec, names: IDENTITY,
        recognise=lambda config: config.get("family") == kind, from_spec=lambda spec: checkpoint.pack(kind, spec),
        to_spec=lambda config, where: checkpoint.unpack(config, settings, where))


FAMILIES = Families({"duplex": "duplex model", "csm": "CSM"}, {
    "duplex": (own("duplex", DuplexSpec), KYUTAI, HF_MOSHI), "csm": (own("csm", CSMSpec), HF_CSM)},
    ("model*.safetensors", "hibiki-*.safetensors", "dsm_*.safetensors", "pytorch_model*.bin",
     "consolidated.safetensors", "lora.safetensors"),
    {("duplex", ".safetensors"): read_file})
