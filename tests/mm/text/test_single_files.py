"""Models in one file: GGUF against transformers' own reading of the directory it was made from, and llama2.c."""

import struct

import numpy as np
import pytest
import torch
import transformers
from support import redraw

from mm import TextDecoder
from mm.errors import InputError
from mm.recipes.weights import stories260k

gguf = pytest.importorskip("gguf")


def riffled(x, heads):
    """A rotary projection in GGUF's order: pairs side by side."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INNER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def in_gguf(name, value, c):
    """A tensor of transformers under GGUF's name; llama's rotary pairs lie side by side."""
    name, part = name.removeprefix("model.").rsplit(".", 1)
    if name in NAMES:
        return f"{NAMES[name]}.{part}", value
    _, n, rest = name.split(".", 2)
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(rest)
    return f"blk.{n}.{INNER[rest]}.{part}", riffled(value, heads) if heads and c.model_type == "llama" else value


def write_gguf(path, model, kind=None, freqs=None):
    """kind: how its matrices are quantised."""
    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_freq_base(10000.0)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs.numpy())
    for name, value in model.state_dict().items():
        name, value = in_gguf(name, value, c)
        value = value.contiguous().numpy().astype(np.float32)
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def made(model_type, **settings):
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **settings)
    return redraw(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
@pytest.mark.parametrize("model_type, settings", [("llama", {"rope_parameters": LLAMA3}), ("qwen2", {}),
                                                  ("qwen3", {"head_dim": 16})])
def test_a_gguf_file_is_the_model_it_was_made_from(model_type, settings, tmp_path):
    theirs = made(model_type, **settings)
    freqs = None
    if settings.get("rope_parameters"):
        freqs = 1e4 ** (-torch.arange(4) / 4) / theirs.model.rotary_emb.inv_freq
    write_gguf(tmp_path / "model.gguf", theirs, freqs=freqs)
    ours = TextDecoder.from_pretrained(tmp_path / "model.gguf")
    ids = torch.randint(97, (2, 40))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_quantised_weights_are_those_that_gguf_reads(kind, tmp_path):
    kind, theirs = gguf.GGMLQuantizationType[kind], made("llama")
    write_gguf(tmp_path / "model.gguf", theirs, kind)
    for value in theirs.parameters():
        if value.ndim == 2:
            value.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)))
    ours, ids = TextDecoder.from_pretrained(tmp_path / "model.gguf"), torch.randint(97, (2, 40))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5


def test_broken_gguf_files_are_named(tmp_path):
    write_gguf(tmp_path / "model.gguf", made("llama"))
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (3, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut.gguf"):
            TextDecoder.from_pretrained(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00"
                                                        b"\x00\x00\x00\x00llama",
                                                        b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00"
                                                        b"\x00\x00\x00\x00mamba"))
    with pytest.raises(InputError, match="mamba, only llama, qwen2, qwen3"):
        TextDecoder.from_pretrained(tmp_path / "other.gguf")


@torch.no_grad()
def test_a_llama2c_file_is_the_model_it_was_made_from(tmp_path):
    model = TextDecoder.from_pretrained(stories260k())
    spec, state = model.spec, model.state_dict()
    mixer, depth = spec.stack.layers[0].mixer, len(spec.stack.layers)
    order = ["mixer_norm", "q", "k", "v", "mixer.out", "mlp_norm", "mlp.gate", "mlp.down", "mlp.up"]

    def weight(i, name):
        if name not in "qkv":
            return state[f"stack.blocks.{i}.{name}.weight"]
        kv = mixer.kv_heads * mixer.head_dim
        parts = state[f"stack.blocks.{i}.mixer.qkv.weight"].split([mixer.heads * mixer.head_dim, kv, kv])
        part = parts["qkv".index(name)]
        return part if name == "v" else riffled(part, mixer.heads if name == "q" else mixer.kv_heads)
    parts = [state["embed.tokens.weight"], *(weight(i, name) for name in order for i in range(depth)),
             state["stack.final_norm.weight"], torch.zeros(spec.context * mixer.head_dim)]
    header = struct.pack("<7i", spec.stack.dim, spec.stack.layers[0].mlp.hidden, depth, mixer.heads, mixer.kv_heads,
                         spec.embed.vocab, spec.context)
    data = header + b"".join(part.contiguous().numpy().tobytes() for part in parts)
    (tmp_path / "model.bin").write_bytes(data)
    again = TextDecoder.from_pretrained(tmp_path / "model.bin")
    ids = torch.randint(512, (1, 30))
    assert torch.equal(again(ids), model(ids)) and again.tokenizer is None
    (tmp_path / "cut.bin").write_bytes(data[:-5000])
    with pytest.raises(InputError, match="cut.bin"):
        TextDecoder.from_pretrained(tmp_path / "cut.bin")
