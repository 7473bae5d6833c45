"""Checkpoint layouts of language models, by kind."""

from __future__ import annotations

from mm.checkpoint.family import Families, own_family
from mm.spec import DecoderSpec, EncoderSpec, Seq2SeqSpec
from mm.text.families import decoder

HOME = "mm.text.families."
OWN_DECODER = own_family("decoder", DecoderSpec, has_text=True, files=decoder.files, complete=decoder.complete)
FAMILIES = Families({"decoder": "text decoder", "encoder": "text encoder", "seq2seq": "encoder-decoder"}, {
    "decoder": (OWN_DECODER, *(HOME + place for place in (
        "llama:KINDS", "gpt2:KINDS", "experts:KINDS", "deepseek:KINDS"))),
    "encoder": (own_family("encoder", EncoderSpec, has_text=True), HOME + "bert:KINDS"),
    "seq2seq": (own_family("seq2seq", Seq2SeqSpec, has_text=True), HOME + "t5:KINDS"),
}, ("model*.safetensors", "pytorch_model*.bin"),
    {("decoder", ".gguf"): HOME + "gguf:read_gguf", ("decoder", ".bin"): HOME + "llama2c:read_llama2c",
     ("decoder", ".data"): HOME + "llama2c:read_llama2c"})
