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


def write_gguf(path, model):
    c, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_freq_base(10000.0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in state.items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if name == "lm_head":
            theirs = "output"
        elif name in names:
            theirs = names[name]
        else:
            _, n, rest = name.split(".", 2)
            theirs = f"blk.{n}.{inner[rest]}"
            value = riffled(value, c.num_attention_heads) if rest.endswith("q_proj") else value
            value = riffled(value, c.num_key_value_heads) if rest.endswith("k_proj") else value
        writer.add_tensor(theirs + ".weight", value.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path):
    torch.manual_seed(0)
    theirs = redraw(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)))
    write_gguf(tmp_path / "model.gguf", theirs)
    ours = TextDecoder.from_pretrained(tmp_path / "model.gguf")
    ids = torch.randint(97, (2, 20))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:200])
    with pytest.raises(InputError, match="cut.gguf"):
        TextDecoder.from_pretrained(tmp_path / "cut.gguf")


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
