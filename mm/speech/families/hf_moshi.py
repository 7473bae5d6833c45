"""Moshi as transformers' MoshiForConditionalGeneration keeps it. Its files hold the codec too, which `Mimi` reads from
Kyutai's; what is written here has none, and transformers begins a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mm.checkpoint.family import Extras, Family, Keys, ensure_kept
from mm.checkpoint.tables import Rule, Table, WeightTransform, rule
from mm.errors import InputError
from mm.spec import Attention, Depth, DuplexSpec, Layer, Mlp, RMSNorm, Rope, Stack, TextStream, Window
from mm.speech.families.moshi_weights import HALVES, STACKED, each
from mm.text.families.hf import ACTS, CONFIG, FILES, HARMLESS, TO_HF, act_of, rope_config, rope_of

CODEC = "the codec, which is a model of its own"
LATER = 1  # frames by which every codebook but a voice's first is delayed
BESIDE = {"audio_encoder_config", "is_encoder_decoder", "depth_decoder_config"}


def to_spec(config: Mapping[str, Any], where: str) -> DuplexSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    deep = Keys(config.get("depth_decoder_config") or {}, f"{where}: depth_decoder_config")
    codec = config.get("audio_encoder_config") or {}
    keys = Keys({name: value for name, value in config.items() if name not in BESIDE}, where)
    dim, count, window = keys.positive("hidden_size", 4096), keys.positive("num_codebooks", 8), keys.positive(
        "sliding_window", 3000)
    rope = rope_of(keys, keys.positive("max_position_embeddings", 3000))
    if rope.scaling is not None:
        raise InputError(f"{where}: rope_parameters should not scale positions in Moshi")
    layer = to_layer(keys, dim, 32, 22528, Window(left=window - 1, right=0), Rope(theta=rope.theta,
                                                                                layout="interleaved"))
    vocab = keys.positive("vocab_size", 32000)
    card = keys.positive("audio_vocab_size", codec.get("codebook_size", 2048))
    stack = Stack(dim=dim, layers=(layer,) * keys.positive("num_hidden_layers", 32), final_norm=layer.norm)
    for name in ("vocab_size", "audio_vocab_size", "input_size", "num_codebooks", "sliding_window",
                 "max_position_embeddings"):  # those of the whole model, said again
        deep.left.pop(name, None)
    width = deep.positive("hidden_size", 1024)
    inner = to_layer(deep, width, 16, 5632, Window(right=0), None)
    depth = Depth(stack=Stack(dim=width, layers=(inner,) * deep.positive("num_hidden_layers", 6)),
                  weights=tuple(range(count)))
    for one in (keys, deep):
        if one.take("tie_word_embeddings", bool, False):
            raise InputError(f"{one.where}: tied word embeddings are not supported")
        one.done(HARMLESS)
    voice = (0, *[LATER] * (count - 1))
    return DuplexSpec(text=TextStream(vocab=vocab), stack=stack, card=card, delays=(0, *voice, *voice), depth=depth,
                      context=window)


def to_layer(keys: Keys, dim: int, heads: int, width: int, window: Window, rope: Rope | None) -> Layer:
    heads = keys.positive("num_attention_heads", heads)
    mixer = Attention(heads=heads, kv_heads=keys.positive("num_key_value_heads", heads), window=window, rope=rope,
                      head_dim=keys.positive("head_dim", max(dim // heads, 1)), q_bias=False, k_bias=False,
                      v_bias=False, out_bias=False, dropout=float(keys.take("attention_dropout", (int, float), 0.0)))
    mlp = Mlp(hidden=keys.positive("ffn_dim", width) // 2, act=act_of(keys, "hidden_act", "silu"), gated=True,
              up_bias=False, down_bias=False)
    eps = float(keys.take("rms_norm_eps", (int, float), 1e-8))
    return Layer(mixer=mixer, mlp=mlp, norm=RMSNorm(eps=eps, order="scale_then_cast"))


def from_spec(spec: DuplexSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    layer, depth = spec.stack.layers[0], spec.depth
    window = layer.mixer.window if isinstance(layer.mixer, Attention) else None
    if depth is None or window is None or window.left is None or layer.mixer.rope is None:
        raise InputError("the hf layout of Moshi has a depth transformer, attention with rope and a window")
    window = window.left + 1
    config = layer_config(spec.stack) | {
        "architectures": ["MoshiForConditionalGeneration"], "model_type": "moshi", "vocab_size": spec.text.vocab,
        "audio_vocab_size": spec.card, "num_codebooks": depth.codebooks, "sliding_window": window,
        "max_position_embeddings": window, "tie_word_embeddings": False,
        "rope_parameters": rope_config(Rope(theta=layer.mixer.rope.theta), layer.mixer.head_dim),
        "audio_encoder_config": {"model_type": "mimi", "codebook_size": spec.card},
        "depth_decoder_config": layer_config(depth.stack) | {
            "model_type": "moshi_depth", "input_size": spec.stack.dim, "vocab_size": spec.text.vocab,
            "audio_vocab_size": spec.card, "num_codebooks": depth.codebooks, "sliding_window": depth.codebooks,
            "max_position_embeddings": depth.codebooks + 1}}
    ensure_kept(spec, to_spec(config, "config"), "hf (moshi)")
    return config


def layer_config(stack: Stack) -> dict[str, Any]:
    layer = stack.layers[0]
    if not isinstance(layer.mlp, Mlp) or not isinstance(layer.norm, RMSNorm) or layer.mlp.act not in TO_HF:
        raise InputError(f"the hf layout of Moshi has RMSNorm and gated MLPs with {', '.join(sorted(set(ACTS)))}")
    return {"hidden_size": stack.dim, "num_hidden_layers": len(stack.layers), "hidden_act": TO_HF[layer.mlp.act],
            "num_attention_heads": layer.mixer.heads, "num_key_value_heads": layer.mixer.kv_heads,
            "head_dim": layer.mixer.head_dim, "ffn_dim": 2 * layer.mlp.hidden, "rms_norm_eps": layer.norm.eps}


def halved(mixer: Attention) -> WeightTransform:
    """Query, key and value projections whose rotary pairs lie in halves; ours are one, and interleaved."""
    sizes = [heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]

    def rotated(x: torch.Tensor, heads: int, shape: tuple[int, int]) -> torch.Tensor:
        return x.unflatten(0, (heads, *shape)).transpose(1, 2).flatten(0, 2)

    def load(xs):
        pairs = zip(xs[:2], (mixer.heads, mixer.kv_heads), strict=True)
        return [torch.cat([*(rotated(x, heads, (2, -1)) for x, heads in pairs), xs[2]])]

    def save(xs):
        q, k, v = xs[0].split(sizes)
        return [rotated(q, mixer.heads, (-1, 2)), rotated(k, mixer.kv_heads, (-1, 2)), v]
    return WeightTransform(load, save)


def joined(mixer: Attention) -> WeightTransform:
    """Query, key and value projections of every step, (steps, rows, D); ours are one."""
    sizes = [heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    return WeightTransform(lambda xs: [torch.cat(list(xs), 1)], lambda xs: list(xs[0].split(sizes, 1)))


def table(spec: DuplexSpec, names: Iterable[str]) -> Table:
    count, depth = spec.own, spec.depth
    rules: list[Rule] = [
        rule("decoder.model.embed_tokens.weight", "text.weight"), rule("decoder.lm_head.weight", "head.weight"),
        rule(each("embed_tokens.{}.weight", spec.codebooks), "codes.weight", STACKED),
        rule("decoder.model.norm.weight", "stack.final_norm.weight"),
        rule("depth_decoder.text_embed_tokens.weight", "depth.text.weight"),
        rule(each("depth_decoder.embed_tokens.{}.weight", count - 1), "depth.codes.weight", STACKED),
        rule("depth_decoder.input_projections.weight", "depth.input.weight"),
        rule("depth_decoder.lm_heads.weight", "depth.head.weight")]
    sides = (("decoder.model.layers.{n}.", "stack.blocks.{n}.", halved(spec.stack.layers[0].mixer)),
             ("depth_decoder.layers.{n}.", "depth.stack.blocks.{n}.", joined(depth.stack.layers[0].mixer)))
    for theirs, ours, transform in sides:
        rules += [rule(tuple(f"{theirs}self_attn.{x}_proj.linear.weight" for x in "qkv"), ours + "mixer.qkv.weight",
                       transform),
                  rule(theirs + "self_attn.o_proj.linear.weight", ours + "mixer.out.weight"),
                  rule(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"),
                  rule(theirs + "post_attention_layernorm.weight", ours + "mlp_norm.weight"),
                  rule(theirs + "mlp.fc2.weight", ours + "mlp.down.weight")]
    rules += [rule("decoder.model.layers.{n}.mlp.fc1.weight",
                   ("stack.blocks.{n}.mlp.gate.weight", "stack.blocks.{n}.mlp.up.weight"), HALVES),
              rule("depth_decoder.layers.{n}.mlp.fc1.weight", "depth.stack.blocks.{n}.mlp.up.weight")]
    return Table(tuple(rules), {"audio_encoder.{name}": CODEC})


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {CONFIG: config}


HF_MOSHI = Family(
    layout="hf", config=CONFIG, weights=FILES, to_spec=to_spec, from_spec=from_spec, table=table, files=files,
    has_text=True, model_types=("moshi",), accepts=lambda config: "hidden_size" in config)
