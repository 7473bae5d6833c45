"""Attention layers against the reference libraries: what a mixer has beyond queries, keys and values."""

import pytest
import torch
from support import attention, carry, close, model, redraw, stack
from timm.layers import RotaryEmbeddingCat
from timm.layers.diff_attention import DiffAttention
from timm.models.eva import EvaBlock
from torch import nn
from transformers.models.diffllama.modeling_diffllama import DiffLlamaConfig, DiffLlamaModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssConfig, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextConfig
from transformers.models.whisper.modeling_whisper import WhisperConfig, WhisperDecoderLayer

from mm import spec
from mm.encoders.vision import grid
from mm.errors import InputError
from mm.nn.attention import CrossAttention
from mm.nn.transformer import Transformer
from mm.positions import rope
from mm.positions.visibility import along, padded
from mm.spec import CAUSAL, LayerNorm, RMSNorm, Rope, Window

DIM, LENGTH, WINDOW = 32, 40, 7
BIASLESS = dict(q_bias=False, k_bias=False, v_bias=False, out_bias=False)
GROUPED = dict(hidden_size=DIM, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               vocab_size=16, attn_implementation="eager")
SELF = {"blocks.{}.mixer.qkv": ("q_proj", "k_proj", "v_proj"), "blocks.{}.mixer.out": "o_proj"}


def alone(mixer):
    """A stack that computes x + mixer(x)."""
    return Transformer(spec.Stack(dim=DIM, layers=(spec.Layer(mixer=mixer, mixer_norm=False),)))


def called(theirs, rotary, x, window=LENGTH):
    """A transformers attention module called as its model would."""
    mask = torch.full((LENGTH, LENGTH), -torch.inf)
    mask = mask.triu(1) + mask.tril(-window)
    return theirs(x, rotary(x, torch.arange(LENGTH)[None]), mask.expand(len(x), 1, -1, -1))[0]


def test_sinks_are_gpt_osss():
    config = GptOssConfig(**GROUPED, head_dim=8, sliding_window=WINDOW, rope_parameters=dict(
        rope_type="default", rope_theta=10000.0))
    theirs = redraw(GptOssAttention(config, 0), 1.0)
    ours = alone(attention(window=Window(left=WINDOW - 1, right=0), sinks=True, rope=Rope()))
    carry(ours, theirs.state_dict(), SELF | {"blocks.{}.mixer.sinks": "sinks"})
    x = torch.randn(2, LENGTH, DIM)
    close(ours(x), x + called(theirs, GptOssRotaryEmbedding(config), x, WINDOW))


def test_a_gate_per_element_is_qwen3_nexts():
    theirs = redraw(Qwen3NextAttention(Qwen3NextConfig(**GROUPED, head_dim=8, rms_norm_eps=1e-6), 0))
    ours = alone(attention(window=CAUSAL, rope=Rope(), gate="element", **BIASLESS,
                           qk_norm=spec.QKNorm(norm=RMSNorm(order="one_plus"))))
    source = theirs.state_dict()
    q, gate = source["q_proj.weight"].unflatten(0, (4, 2, 8)).unbind(1)
    source |= {"q_proj.weight": q.flatten(0, 1), "gate.weight": gate.flatten(0, 1)}
    carry(ours, source, SELF | {f"blocks.{{}}.mixer.{x}": x for x in ("gate", "q_norm", "k_norm")})
    x = torch.randn(2, LENGTH, DIM)
    close(ours(x), x + called(theirs, LlamaRotaryEmbedding(LlamaConfig(**GROUPED)), x))


@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("gate", ["head", "element"])
def test_a_gate_multiplies_the_heads(gate, differential):
    base = attention(gate=gate)
    gated = redraw(alone(spec.Differential(base=base, lambda_init=0.4) if differential else base))
    mixer, x = gated.blocks[0].mixer, torch.randn(2, LENGTH, DIM)
    heads = []
    mixer.out.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    gated(x)
    weight, mixer.gate = mixer.gate.weight, None
    gated(x)
    factor = torch.sigmoid(x @ weight.T).unflatten(-1, (4, -1))
    close(heads[0], (heads[1].unflatten(-1, (4, -1)) * factor).flatten(-2))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_first_positions_that_stay_are_streaming_llms(layout):
    """A late token sees what a model without a window would see that was given the first tokens and the last ones,
    counted from 0 (Xiao et al., 2023, section 3.2: positions within the cache)."""
    first, left = 2, 6
    windowed = stack(attention(window=Window(left=left, right=0, first=first), rope=Rope(theta=50, layout=layout)))
    free = stack(attention(window=CAUSAL, rope=Rope(theta=50, layout=layout)))
    ours, theirs = model(windowed, torch.float64), model(free, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    made = ours(x)
    for at in range(30):
        kept = list(range(at + 1)) if at <= left else [*range(first), *range(at - left + first, at + 1)]
        assert len(kept) == min(at, left) + 1
        close(made[:, at], theirs(x[:, kept])[:, -1])


def test_an_extra_key_is_torchs_add_bias_kv():
    """Also behind a rope and a causal mask, where torch shows the extra key to every query."""
    theirs = redraw(nn.MultiheadAttention(DIM, 4, add_bias_kv=True, batch_first=True))
    source = {name: x.view(4, 8) if name in ("bias_k", "bias_v") else x for name, x in theirs.state_dict().items()}
    table = {"blocks.{}.mixer.qkv.weight": "in_proj_weight", "blocks.{}.mixer.qkv.bias": "in_proj_bias",
             "blocks.{}.mixer.out": "out_proj", "blocks.{}.mixer.extra_k": "bias_k",
             "blocks.{}.mixer.extra_v": "bias_v"}
    x, mask = torch.randn(2, LENGTH, DIM), torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for window, blind in ((spec.EVERYWHERE, None), (CAUSAL, mask)):
        ours = alone(attention(kv_heads=4, window=window, extra_key=True))
        carry(ours, source, table)
        close(ours(x), x + theirs(x, x, x, attn_mask=blind)[0])


def test_an_extra_key_does_not_turn():
    net, x = redraw(alone(attention(kv_heads=4, extra_key=True, rope=Rope()))), torch.randn(2, LENGTH, DIM)
    mixer = net.blocks[0].mixer
    rotation = rope.rotation(along(2, LENGTH).position, Rope(), 8)
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in mixer.qkv(x))
    extra_k, extra_v = (y[None, :, None].expand(2, -1, -1, -1) for y in (mixer.extra_k, mixer.extra_v))
    heads = nn.functional.scaled_dot_product_attention(
        rope.apply(q, rotation), torch.cat([rope.apply(k, rotation), extra_k], 2), torch.cat([v, extra_v], 2))
    close(net(x), x + mixer.out(heads.transpose(1, 2).flatten(2)))


# -------------------------------------------------------------------------------------------- differential
def test_differential_attention_is_timms():
    theirs = redraw(DiffAttention(DIM, 2, qkv_bias=True, qk_norm=True, depth=3))
    ours = alone(spec.Differential(lambda_init=theirs.lambda_init, base=attention(
        heads=2, qk_norm=spec.QKNorm(norm=RMSNorm(eps=theirs.q_norm.eps)))))
    source = dict(theirs.state_dict())
    source["lambdas"] = torch.stack([source.pop(f"lambda_{x}") for x in ("q1", "k1", "q2", "k2")])
    carry(ours, source, {
        "blocks.{}.mixer.qkv": "qkv", "blocks.{}.mixer.out": "proj", "blocks.{}.mixer.pair_norm": "sub_norm",
        "blocks.{}.mixer.lambdas": "lambdas", "blocks.{}.mixer.q_norm": "q_norm", "blocks.{}.mixer.k_norm": "k_norm"})
    x = torch.randn(2, LENGTH, DIM)
    close(ours(x), x + theirs(x))


def test_grouped_differential_attention_is_diffllamas():
    config = DiffLlamaConfig(**GROUPED | dict(num_attention_heads=8, num_key_value_heads=4), head_dim=8)
    theirs = redraw(DiffLlamaModel(config))
    source = dict(theirs.state_dict())
    for i in range(2):
        source[f"{i}.lambdas"] = torch.stack([source.pop(f"layers.{i}.self_attn.lambda_{x}")
                                              for x in ("q1", "k1", "q2", "k2")])
        for x in "qkv":  # theirs pairs head h with h + half, ours lie side by side
            name = f"layers.{i}.self_attn.{x}_proj.weight"
            source[name] = source[name].unflatten(0, (2, -1, 8)).transpose(0, 1).flatten(0, 2)
    mlp = spec.Mlp(hidden=48, act="silu", gated=True, up_bias=False, down_bias=False)
    norm = RMSNorm(eps=config.rms_norm_eps)
    base = attention(window=CAUSAL, rope=Rope(), **BIASLESS)
    mixers = [spec.Differential(base=base, lambda_init=layer.self_attn.lambda_init,
                                norm=spec.L2Norm(eps=config.rms_norm_eps)) for layer in theirs.layers]
    ours = Transformer(spec.Stack(dim=DIM, layers=tuple(spec.Layer(mixer=m, mlp=mlp, norm=norm) for m in mixers),
                                  final_norm=norm))
    own = "layers.{}.self_attn."
    carry(ours, source, {
        "blocks.{}.mixer.qkv": (own + "q_proj", own + "k_proj", own + "v_proj"), "blocks.{}.mixer.out": own + "o_proj",
        "blocks.{}.mixer.lambdas": "{}.lambdas", "blocks.{}.mixer_norm": "layers.{}.input_layernorm",
        "blocks.{}.mlp_norm": "layers.{}.post_attention_layernorm", "blocks.{}.mlp.up": "layers.{}.mlp.up_proj",
        "blocks.{}.mlp.gate": "layers.{}.mlp.gate_proj", "blocks.{}.mlp.down": "layers.{}.mlp.down_proj",
        "final_norm": "norm"}, ("embed_tokens",))
    x = torch.randn(2, LENGTH, DIM)
    close(ours(x), theirs(inputs_embeds=x, use_cache=False).last_hidden_state)


# --------------------------------------------------------------------------------------------- inner norms
def test_inner_norms_and_layer_scale_are_eva02s():
    """Also queries and values with a bias beside keys without one."""
    theirs = redraw(EvaBlock(DIM, 4, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, mlp_ratio=1.5,
                             init_values=0.1, num_prefix_tokens=0, norm_layer=nn.LayerNorm))
    mixer = attention(kv_heads=4, k_bias=False, inner_norm=LayerNorm(),
                      rope=Rope(layout="interleaved", axes=spec.Axial()))
    mlp = spec.Mlp(hidden=48, act="silu", gated=True, inner_norm=LayerNorm())
    ours = Transformer(spec.Stack(dim=DIM, layers=(spec.Layer(mixer=mixer, mlp=mlp, layer_scale=0.1),)))
    source = dict(theirs.state_dict())
    source["qkv.bias"] = torch.cat([source.pop("attn.q_bias"), source.pop("attn.v_bias")])
    carry(ours, source, {
        "blocks.{}.mixer_norm": "norm1", "blocks.{}.mixer.qkv.weight": "attn.qkv.weight",
        "blocks.{}.mixer.qkv.bias": "qkv.bias", "blocks.{}.mixer.inner_norm": "attn.norm",
        "blocks.{}.mixer.out": "attn.proj", "blocks.{}.mixer_scale": "gamma_1", "blocks.{}.mlp_norm": "norm2",
        "blocks.{}.mlp.gate": "mlp.fc1_g", "blocks.{}.mlp.up": "mlp.fc1_x", "blocks.{}.mlp.inner_norm": "mlp.norm",
        "blocks.{}.mlp.down": "mlp.fc2", "blocks.{}.mlp_scale": "gamma_2"})
    x = torch.randn(2, LENGTH, DIM)
    table = RotaryEmbeddingCat(8, in_pixels=False).get_embed([5, 8])
    close(ours(x, along(2, LENGTH, coords=grid.index_grid(5, 8).expand(2, -1, -1))), theirs(x, rope=table))


def test_learned_mixed_frequencies_turn_queries_and_keys():
    """Per head and layer: the module's own parameter is what `rope.turn` is given."""
    net = redraw(alone(attention(kv_heads=4, rope=Rope(axes=spec.Mixed()))))
    x, coords = torch.randn(2, LENGTH, DIM), grid.index_grid(5, 8).expand(2, -1, -1)
    mixer = net.blocks[0].mixer
    rotation = rope.rotation(coords, mixer.settings.rope, 8, mixer.mixed)
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in mixer.qkv(x))
    heads = nn.functional.scaled_dot_product_attention(rope.apply(q, rotation), rope.apply(k, rotation), v)
    close(net(x, along(2, LENGTH, coords=coords)), x + mixer.out(heads.transpose(1, 2).flatten(2)))
    net(x, along(2, LENGTH, coords=coords)).square().sum().backward()
    assert mixer.mixed.grad.abs().min() > 0


# --------------------------------------------------------------------------------------------------- cross
def test_a_decoder_layer_is_whispers():
    """Pre-norm, cross-attention, keys without a bias in both attentions."""
    theirs = redraw(WhisperDecoderLayer(WhisperConfig(d_model=DIM, decoder_attention_heads=4, decoder_ffn_dim=48), 0))
    heads = attention(kv_heads=4, k_bias=False)
    own = attention(kv_heads=4, k_bias=False, window=CAUSAL)
    ours = Transformer(spec.Stack(dim=DIM, layers=(spec.Layer(mixer=own, cross=heads, mlp=spec.Mlp(hidden=48)),)))
    carry(ours, theirs.state_dict(), {
        "blocks.{}.mixer_norm": "self_attn_layer_norm", "blocks.{}.cross_norm": "encoder_attn_layer_norm",
        "blocks.{}.mixer.qkv": tuple(f"self_attn.{x}_proj" for x in "qkv"),
        "blocks.{}.mixer.out": "self_attn.out_proj", "blocks.{}.cross.q": "encoder_attn.q_proj",
        "blocks.{}.cross.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "blocks.{}.cross.out": "encoder_attn.out_proj", "blocks.{}.mlp_norm": "final_layer_norm",
        "blocks.{}.mlp.up": "fc1", "blocks.{}.mlp.down": "fc2"})
    x, memory = torch.randn(2, LENGTH, DIM), torch.randn(2, 55, DIM)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).expand(2, 1, -1, -1)
    close(ours(x, memory=memory), theirs(x, attention_mask=mask, encoder_hidden_states=memory, use_cache=False))


def test_a_post_norm_decoder_is_torchs():
    """Cross-attention under norms on the residual sum, with padding in the memory."""
    theirs = redraw(nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 4, 48, batch_first=True), 2))
    heads = attention(kv_heads=4)
    layer = spec.Layer(mixer=attention(kv_heads=4, window=CAUSAL), cross=heads, mlp=spec.Mlp(hidden=48, act="relu"),
                       placement="residual_post")
    ours = Transformer(spec.Stack(dim=DIM, layers=(layer, layer)))
    source = dict(theirs.state_dict())
    for i in range(2):
        for kind in ("weight", "bias"):
            x = source.pop(f"layers.{i}.multihead_attn.in_proj_{kind}")
            source[f"{i}.q.{kind}"], source[f"{i}.kv.{kind}"] = x.split([DIM, 2 * DIM])
    carry(ours, source, {
        "blocks.{}.mixer.qkv.weight": "layers.{}.self_attn.in_proj_weight",
        "blocks.{}.mixer.qkv.bias": "layers.{}.self_attn.in_proj_bias",
        "blocks.{}.mixer.out": "layers.{}.self_attn.out_proj", "blocks.{}.cross.q": "{}.q",
        "blocks.{}.cross.kv": "{}.kv",
        "blocks.{}.cross.out": "layers.{}.multihead_attn.out_proj", "blocks.{}.mlp.up": "layers.{}.linear1",
        "blocks.{}.mlp.down": "layers.{}.linear2", "blocks.{}.mixer_norm": "layers.{}.norm1",
        "blocks.{}.cross_norm": "layers.{}.norm2", "blocks.{}.mlp_norm": "layers.{}.norm3"})
    x, memory = torch.randn(2, LENGTH, DIM), torch.randn(2, 55, DIM)
    real = torch.arange(55) < torch.tensor([[30], [55]])
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    wanted = theirs(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=~real)
    close(ours(x, memory=memory, memory_at=padded(real)), wanted)


def test_memory_of_another_width_is_torchs_kdim():
    theirs = redraw(nn.MultiheadAttention(DIM, 4, kdim=20, vdim=20, batch_first=True))
    ours = CrossAttention(DIM, 20, attention(kv_heads=4))
    q, *kv = theirs.in_proj_bias.detach().chunk(3)
    source = theirs.state_dict() | {"q.bias": q, "kv.bias": torch.cat(kv)}
    carry(ours, source, {"q.weight": "q_proj_weight", "kv.weight": ("k_proj_weight", "v_proj_weight"),
                         "q.bias": "q.bias", "kv.bias": "kv.bias", "out": "out_proj"}, ("in_proj_bias",))
    x, memory = torch.randn(2, LENGTH, DIM), torch.randn(2, 55, 20)
    close(ours(x, along(2, LENGTH), memory, along(2, 55)), theirs(x, memory, memory)[0])


def test_cross_attention_without_a_fitting_memory_is_refused():
    layer = spec.Layer(mixer=attention(), cross=attention(), mlp=spec.Mlp(hidden=8))
    net, x = Transformer(spec.Stack(dim=DIM, layers=(layer,), memory_dim=20)), torch.zeros(2, 5, DIM)
    assert net(x, memory=torch.zeros(2, 9, 20)).shape == x.shape
    for memory in (None, torch.zeros(2, 9, DIM), torch.zeros(3, 9, 20), torch.zeros(2, 20)):
        with pytest.raises(InputError, match=r"memory \(2, S, 20\)"):
            net(x, memory=memory)
