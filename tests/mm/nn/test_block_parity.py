"""Whole blocks against the reference libraries: two layers of each family with re-drawn weights carried over and a
sequence longer than every window. Each family is here for the switches that it alone needs."""

import pytest
import torch
from support import attention, carry, close, redraw
from torch import nn
from transformers.models.bert.modeling_bert import BertConfig, BertEncoder
from transformers.models.bloom.modeling_bloom import BloomConfig, BloomModel
from transformers.models.falcon.modeling_falcon import FalconConfig, FalconModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2Model
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXConfig, GPTNeoXModel
from transformers.models.gptj.modeling_gptj import GPTJConfig, GPTJModel
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextModel
from transformers.models.mistral.modeling_mistral import MistralConfig, MistralModel
from transformers.models.modernbert.modeling_modernbert import ModernBertConfig, ModernBertModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2Config, Olmo2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3Model
from transformers.models.t5.modeling_t5 import T5Config, T5EncoderModel

from mm import spec
from mm.nn.transformer import Transformer
from mm.spec import CAUSAL, LayerNorm, RMSNorm, Rope, Window

DIM, HIDDEN, LENGTH, WINDOW = 32, 48, 40, 7
SIZES = dict(hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, vocab_size=16,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
GROUPED = SIZES | dict(num_key_value_heads=2)
BIASLESS = dict(q_bias=False, k_bias=False, v_bias=False, out_bias=False)
FAMILIES = {}

LLAMA = {
    "blocks.{}.mixer_norm": "layers.{}.input_layernorm",
    "blocks.{}.mixer.qkv": tuple(f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{}.mixer.out": "layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "layers.{}.mlp.up_proj",
    "blocks.{}.mlp.gate": "layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
}
QK_NORM = {f"blocks.{{}}.mixer.{x}_norm": f"layers.{{}}.self_attn.{x}_norm" for x in "qk"}


def family(make):
    FAMILIES[make.__name__] = make
    return make


def swiglu(act="silu"):
    return spec.Mlp(hidden=HIDDEN, act=act, gated=True, up_bias=False, down_bias=False)


def layers(*mixers, **rest):
    """A stack with one layer per mixer."""
    return spec.Stack(dim=DIM, layers=tuple(spec.Layer(mixer=m, **rest.get("layer", {})) for m in mixers),
                      **{name: value for name, value in rest.items() if name != "layer"})


def last(theirs):
    return lambda x: theirs(inputs_embeds=x, use_cache=False).last_hidden_state


# --------------------------------------------------------------------------------------- pre-norm decoders
@family
def gpt2():
    theirs = redraw(GPT2Model(GPT2Config(n_embd=DIM, n_layer=2, n_head=4, n_inner=HIDDEN, vocab_size=16)))
    theirs.wpe.weight.data.zero_()
    source = {name: x.T if ".c_" in name and x.ndim == 2 else x for name, x in theirs.state_dict().items()}
    ours = layers(*[attention(kv_heads=4, window=CAUSAL)] * 2, layer=dict(mlp=spec.Mlp(hidden=HIDDEN, act="gelu_tanh")),
                  final_norm=LayerNorm())
    table = {"blocks.{}.mixer_norm": "h.{}.ln_1", "blocks.{}.mixer.qkv": "h.{}.attn.c_attn",
             "blocks.{}.mixer.out": "h.{}.attn.c_proj", "blocks.{}.mlp_norm": "h.{}.ln_2",
             "blocks.{}.mlp.up": "h.{}.mlp.c_fc", "blocks.{}.mlp.down": "h.{}.mlp.c_proj", "final_norm": "ln_f"}
    return last(theirs), source, ours, table


@family
def llama():
    """Grouped queries, biases everywhere, RMSNorm, SwiGLU."""
    theirs = redraw(LlamaModel(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)))
    mlp = spec.Mlp(hidden=HIDDEN, act="silu", gated=True)
    norm = RMSNorm(eps=1e-3)
    ours = layers(*[attention(window=CAUSAL, rope=Rope())] * 2, layer=dict(mlp=mlp, norm=norm), final_norm=norm)
    return last(theirs), theirs.state_dict(), ours, LLAMA


@family
def mistral():
    """A window that counts the token itself."""
    theirs = redraw(MistralModel(MistralConfig(**GROUPED, sliding_window=WINDOW)))
    mixer = attention(window=Window(left=WINDOW - 1, right=0), rope=Rope(), **BIASLESS)
    ours = layers(mixer, mixer, layer=dict(mlp=swiglu(), norm=RMSNorm()), final_norm=RMSNorm())
    return last(theirs), theirs.state_dict(), ours, LLAMA


@family
def qwen3():
    """Queries and keys normalised per head; heads wider than dim / heads."""
    theirs = redraw(Qwen3Model(Qwen3Config(**GROUPED, head_dim=16)))
    mixer = attention(head_dim=16, window=CAUSAL, rope=Rope(), qk_norm=spec.QKNorm(norm=RMSNorm()), **BIASLESS)
    ours = layers(mixer, mixer, layer=dict(mlp=swiglu(), norm=RMSNorm()), final_norm=RMSNorm())
    return last(theirs), theirs.state_dict(), ours, LLAMA | QK_NORM


@family
def llama4():
    """Chunks, L2 norm after the interleaved rope, and a layer without positions."""
    theirs = redraw(Llama4TextModel(Llama4TextConfig(
        **GROUPED, head_dim=8, moe_layers=[], intermediate_size_mlp=HIDDEN, no_rope_layers=[1, 0],
        attention_chunk_size=WINDOW, attn_temperature_tuning=False,
        rope_parameters=dict(rope_type="default", rope_theta=500.0))))
    norm = RMSNorm(eps=1e-5)
    near = attention(window=Window(right=0, chunk=WINDOW), rope=Rope(theta=500.0, layout="interleaved"),
                     qk_norm=spec.QKNorm(norm=spec.L2Norm(eps=1e-5), after_rope=True), **BIASLESS)
    ours = layers(near, attention(window=CAUSAL, **BIASLESS), layer=dict(mlp=swiglu(), norm=norm), final_norm=norm)
    source = {name.replace(".feed_forward.", ".mlp."): x for name, x in theirs.state_dict().items()}
    return last(theirs), source, ours, LLAMA


# ------------------------------------------------------------------------------------------ other placements
@family
def gemma2():
    """Sandwich norms of 1 + weight, softcap, its own scale, alternate windows."""
    theirs = redraw(Gemma2Model(Gemma2Config(**GROUPED, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=9,
                                             attn_logit_softcapping=2.0)))
    norm = RMSNorm(order="one_plus")
    near, far = (attention(head_dim=16, window=window, rope=Rope(), softcap=2.0, scale=9.0**-0.5, **BIASLESS)
                 for window in (Window(left=WINDOW - 1, right=0), CAUSAL))
    ours = layers(near, far, layer=dict(mlp=swiglu("gelu_tanh"), norm=norm, placement="sandwich"), final_norm=norm)
    table = LLAMA | {"blocks.{}.mixer_post_norm": "layers.{}.post_attention_layernorm",
                     "blocks.{}.mlp_norm": "layers.{}.pre_feedforward_layernorm",
                     "blocks.{}.mlp_post_norm": "layers.{}.post_feedforward_layernorm"}
    scale = theirs(inputs_embeds=torch.ones(1, 1, DIM), output_hidden_states=True).hidden_states[0][0, 0, 0].item()
    return lambda x: last(theirs)(x / scale), theirs.state_dict(), ours, table


@family
def olmo2():
    """Norms behind the branches; queries and keys normalised over all heads at once."""
    theirs = redraw(Olmo2Model(Olmo2Config(**GROUPED)))
    norm = RMSNorm(eps=1e-5, order="scale_then_cast")
    mixer = attention(window=CAUSAL, rope=Rope(), qk_norm=spec.QKNorm(norm=norm, over="flat"), **BIASLESS)
    ours = layers(mixer, mixer, layer=dict(mlp=swiglu(), norm=norm, placement="post_branch"), final_norm=norm)
    table = LLAMA | QK_NORM | {"blocks.{}.mixer_norm": "layers.{}.post_attention_layernorm",
                               "blocks.{}.mlp_norm": "layers.{}.post_feedforward_layernorm"}
    return last(theirs), theirs.state_dict(), ours, table


@family
def bert():
    """Norms on the residual sum; everybody sees everybody."""
    theirs = redraw(BertEncoder(BertConfig(**SIZES, layer_norm_eps=1e-3)))
    ours = layers(*[attention(kv_heads=4)] * 2, layer=dict(mlp=spec.Mlp(hidden=HIDDEN), norm=LayerNorm(eps=1e-3),
                                                           placement="residual_post"))
    head = "layer.{}.attention."
    table = {"blocks.{}.mixer.qkv": tuple(f"{head}self.{x}" for x in ("query", "key", "value")),
             "blocks.{}.mixer.out": head + "output.dense", "blocks.{}.mixer_norm": head + "output.LayerNorm",
             "blocks.{}.mlp.up": "layer.{}.intermediate.dense", "blocks.{}.mlp.down": "layer.{}.output.dense",
             "blocks.{}.mlp_norm": "layer.{}.output.LayerNorm"}
    return lambda x: theirs(x).last_hidden_state, theirs.state_dict(), ours, table


@family
def falcon():
    """Parallel branches behind one norm, one key head for all queries."""
    theirs = redraw(FalconModel(FalconConfig(**SIZES | dict(ffn_hidden_size=HIDDEN), parallel_attn=True, bias=False)))
    mlp = spec.Mlp(hidden=HIDDEN, up_bias=False, down_bias=False)
    mixer = attention(kv_heads=1, window=CAUSAL, rope=Rope(), **BIASLESS)
    ours = layers(mixer, mixer, layer=dict(mlp=mlp, placement="parallel"), final_norm=LayerNorm())
    table = {"blocks.{}.mixer_norm": "h.{}.input_layernorm",
             "blocks.{}.mixer.qkv": "h.{}.self_attention.query_key_value",
             "blocks.{}.mixer.out": "h.{}.self_attention.dense", "blocks.{}.mlp.up": "h.{}.mlp.dense_h_to_4h",
             "blocks.{}.mlp.down": "h.{}.mlp.dense_4h_to_h", "final_norm": "ln_f"}
    return last(theirs), theirs.state_dict(), ours, table


@family
def gptj():
    """Parallel with an interleaved rope over part of the head."""
    theirs = redraw(GPTJModel(GPTJConfig(n_embd=DIM, n_layer=2, n_head=4, n_inner=HIDDEN, rotary_dim=4, vocab_size=16)))
    mixer = attention(kv_heads=4, window=CAUSAL, rope=Rope(dim=4, layout="interleaved"), **BIASLESS)
    ours = layers(mixer, mixer, layer=dict(mlp=spec.Mlp(hidden=HIDDEN, act="gelu_tanh"), placement="parallel"),
                  final_norm=LayerNorm())
    table = {"blocks.{}.mixer_norm": "h.{}.ln_1", "blocks.{}.mixer.qkv": tuple(f"h.{{}}.attn.{x}_proj" for x in "qkv"),
             "blocks.{}.mixer.out": "h.{}.attn.out_proj", "blocks.{}.mlp.up": "h.{}.mlp.fc_in",
             "blocks.{}.mlp.down": "h.{}.mlp.fc_out", "final_norm": "ln_f"}
    return last(theirs), theirs.state_dict(), ours, table


def by_head(source, heads=4):
    """Fused projections that lie head by head (q k v q k v ...) as q, k, v."""
    return {name: x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2) if ".query_key_value." in name else x
            for name, x in source.items()}


@family
def gpt_neox():
    """Parallel branches with a norm each, a rope over a quarter of the head."""
    theirs = redraw(GPTNeoXModel(GPTNeoXConfig(**SIZES | dict(hidden_size=64), rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25))))
    mixer = attention(kv_heads=4, head_dim=16, window=CAUSAL, rope=Rope(dim=4))
    layer = spec.Layer(mixer=mixer, mlp=spec.Mlp(hidden=HIDDEN), placement="parallel_norms")
    ours = spec.Stack(dim=64, layers=(layer, layer), final_norm=LayerNorm())
    table = {"blocks.{}.mixer_norm": "layers.{}.input_layernorm", "final_norm": "final_layer_norm",
             "blocks.{}.mixer.qkv": "layers.{}.attention.query_key_value",
             "blocks.{}.mixer.out": "layers.{}.attention.dense",
             "blocks.{}.mlp_norm": "layers.{}.post_attention_layernorm",
             "blocks.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h", "blocks.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h"}
    return last(theirs), by_head(theirs.state_dict()), ours, table


@family
def modernbert():
    """No norm before the first mixer, LayerNorm without bias, a two-sided window, a rope per kind of layer."""
    theirs = redraw(ModernBertModel(ModernBertConfig(
        **SIZES, local_attention=2 * WINDOW, layer_types=["full_attention", "sliding_attention"], cls_token_id=3,
        sep_token_id=4, rope_parameters={"full_attention": dict(rope_type="default", rope_theta=500.0),
                                         "sliding_attention": dict(rope_type="default", rope_theta=100.0)})))
    theirs.embeddings.norm = nn.Identity()
    norm = LayerNorm(bias=False)
    far = attention(kv_heads=4, rope=Rope(theta=500.0), **BIASLESS)
    near = attention(kv_heads=4, rope=Rope(theta=100.0), window=Window(left=WINDOW, right=WINDOW), **BIASLESS)
    both = (spec.Layer(mixer=far, mlp=swiglu("gelu"), norm=norm, mixer_norm=False),
            spec.Layer(mixer=near, mlp=swiglu("gelu"), norm=norm))
    source = dict(theirs.state_dict())
    for i in range(2):
        gate, up = source.pop(f"layers.{i}.mlp.Wi.weight").chunk(2)
        source |= {f"layers.{i}.gate.weight": gate, f"layers.{i}.up.weight": up}
    table = {"blocks.{}.mixer_norm": "layers.{}.attn_norm", "blocks.{}.mixer.qkv": "layers.{}.attn.Wqkv",
             "blocks.{}.mixer.out": "layers.{}.attn.Wo", "blocks.{}.mlp_norm": "layers.{}.mlp_norm",
             "blocks.{}.mlp.up": "layers.{}.up", "blocks.{}.mlp.gate": "layers.{}.gate",
             "blocks.{}.mlp.down": "layers.{}.mlp.Wo", "final_norm": "final_norm"}
    return (lambda x: theirs(inputs_embeds=x).last_hidden_state, source,
            spec.Stack(dim=DIM, layers=both, final_norm=norm), table)


# ---------------------------------------------------------------------------------------- shared position biases
@family
def t5():
    """Learned distance buckets, unscaled scores, plain RELU."""
    theirs = redraw(T5EncoderModel(T5Config(d_model=DIM, d_kv=8, d_ff=HIDDEN, num_layers=2, num_heads=4, vocab_size=16,
                                            relative_attention_num_buckets=16, relative_attention_max_distance=30)))
    mlp = spec.Mlp(hidden=HIDDEN, act="relu", up_bias=False, down_bias=False)
    ours = layers(*[attention(kv_heads=4, scale=1.0, **BIASLESS)] * 2, layer=dict(mlp=mlp, norm=RMSNorm()),
                  final_norm=RMSNorm(), relative=spec.Buckets(count=16, distance=30))
    own = "encoder.block.{}.layer."
    table = {"blocks.{}.mixer_norm": own + "0.layer_norm", "blocks.{}.mlp_norm": own + "1.layer_norm",
             "blocks.{}.mixer.qkv": tuple(f"{own}0.SelfAttention.{x}" for x in "qkv"),
             "blocks.{}.mixer.out": own + "0.SelfAttention.o", "blocks.{}.mlp.up": own + "1.DenseReluDense.wi",
             "blocks.{}.mlp.down": own + "1.DenseReluDense.wo", "final_norm": "encoder.final_layer_norm",
             "bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"}
    return lambda x: theirs(inputs_embeds=x).last_hidden_state, theirs.state_dict(), ours, table


@family
def bloom():
    """ALiBi."""
    theirs = redraw(BloomModel(BloomConfig(hidden_size=DIM, n_layer=2, n_head=4, vocab_size=16)))
    theirs.word_embeddings_layernorm = nn.Identity()
    mixer = attention(kv_heads=4, window=CAUSAL)
    ours = layers(mixer, mixer, layer=dict(mlp=spec.Mlp(hidden=4 * DIM, act="gelu_tanh")), final_norm=LayerNorm(),
                  relative=spec.Alibi())
    table = {"blocks.{}.mixer_norm": "h.{}.input_layernorm", "blocks.{}.mlp_norm": "h.{}.post_attention_layernorm",
             "blocks.{}.mixer.qkv": "h.{}.self_attention.query_key_value", "final_norm": "ln_f",
             "blocks.{}.mixer.out": "h.{}.self_attention.dense", "blocks.{}.mlp.up": "h.{}.mlp.dense_h_to_4h",
             "blocks.{}.mlp.down": "h.{}.mlp.dense_4h_to_h"}
    return last(theirs), by_head(theirs.state_dict()), ours, table


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_references(name):
    theirs, source, settings, table = FAMILIES[name]()
    ours = Transformer(settings)
    embeddings = ("wte", "wpe", "embed", "word_embeddings", "shared", "encoder.embed", "tok_embeddings")
    carry(ours, source, table, embeddings)
    x = torch.randn(2, LENGTH, settings.dim)
    with torch.no_grad():
        close(ours(x), theirs(x))
