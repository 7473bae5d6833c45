"""Checkpoint layouts of language models, by kind."""

from __future__ import annotations

from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Families, Family
from mm.checkpoint.tables import IDENTITY
from mm.spec import DecoderSpec, EncoderSpec, Seq2SeqSpec
from mm.text.families import generation
from mm.text.families.bart import BART
from mm.text.families.bert import BERT_KINDS
from mm.text.families.deepseek import DEEPSEEK_KINDS
from mm.text.families.gemma import GEMMA_KINDS
from mm.text.families.gguf import read_gguf
from mm.text.families.gpt2 import GPT2
from mm.text.families.gpt_oss import GPT_OSS
from mm.text.families.llama import LLAMA_KINDS
from mm.text.families.llama2c import read_llama2c
from mm.text.families.llama4 import LLAMA4_KINDS
from mm.text.families.modernbert import MODERNBERT
from mm.text.families.moe import MOE_KINDS
from mm.text.families.phi import PHI_KINDS
from mm.text.families.t5 import T5


def own(kind: str, settings: type, **more: Any) -> Family:
    """This package's own layout; `more` are fields of the family."""
    parts = {"files": lambda config, extras: {checkpoint.CONFIG: config}} | more
    return Family(
        layout="mm", config=checkpoint.CONFIG, weights=(checkpoint.WEIGHTS,), has_text=True, **parts,
        recognise=lambda config: config.get("family") == kind, table=lambda spec, names: IDENTITY,
        to_spec=lambda config, where: checkpoint.unpack(config, settings, where),
        from_spec=lambda spec: checkpoint.pack(kind, spec))


OWN_DECODER = own("decoder", DecoderSpec, files=generation.files, complete=generation.complete)
SINGLE_FILES = {("decoder", ".gguf"): read_gguf, ("decoder", ".bin"): read_llama2c, ("decoder", ".data"): read_llama2c}
FAMILIES = Families({"decoder": "text decoder", "encoder": "text encoder", "seq2seq": "encoder-decoder"}, {
    "decoder": (OWN_DECODER, *LLAMA_KINDS, *GEMMA_KINDS, *PHI_KINDS, GPT2, *MOE_KINDS, GPT_OSS, *LLAMA4_KINDS,
                *DEEPSEEK_KINDS),
    "encoder": (own("encoder", EncoderSpec), *BERT_KINDS, MODERNBERT),
    "seq2seq": (own("seq2seq", Seq2SeqSpec), T5, BART),
}, ("model*.safetensors", "pytorch_model*.bin"), SINGLE_FILES)
