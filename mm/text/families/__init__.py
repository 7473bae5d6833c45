"""Checkpoint layouts of language models, by kind."""

from __future__ import annotations

from mm.checkpoint.family import Families, own_family
from mm.spec import DecoderSpec, EncoderSpec, Seq2SeqSpec
from mm.text.families import generation

HOME = "mm.text.families."
OWN_DECODER = own_family("decoder", DecoderSpec, has_text=True, files=generation.files, complete=generation.complete)
FAMILIES = Families({"decoder": "text decoder", "encoder": "text encoder", "seq2seq": "encoder-decoder"}, {
    "decoder": (OWN_DECODER, *(HOME + place for place in (
        "llama:LLAMA_KINDS", "gemma:GEMMA_KINDS", "phi:PHI_KINDS", "gpt2:GPT2", "moe:MOE_KINDS", "gpt_oss:GPT_OSS",
        "llama4:LLAMA4_KINDS", "deepseek:DEEPSEEK_KINDS"))),
    "encoder": (own_family("encoder", EncoderSpec, has_text=True), HOME + "bert:BERT_KINDS",
                HOME + "modernbert:MODERNBERT"),
    "seq2seq": (own_family("seq2seq", Seq2SeqSpec, has_text=True), HOME + "t5:T5", HOME + "bart:BART"),
}, ("model*.safetensors", "pytorch_model*.bin"),
    {("decoder", ".gguf"): HOME + "gguf:read_gguf", ("decoder", ".bin"): HOME + "llama2c:read_llama2c",
     ("decoder", ".data"): HOME + "llama2c:read_llama2c"})
