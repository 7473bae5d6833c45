"""transformers' Llama-shaped decoders: Llama, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm.errors import InputError
from mm.families.hf import (
    CONFIG,
    FILES,
    HARMLESS,
    ROTARY_BUFFER,
    TIED,
    TO_HF,
    act_of,
    qkv_rules,
    rope_config,
    rope_of,
)
from mm.family import Extras, Family, Keys, ensure_kept
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LMHead, Mlp, QKNorm, RMSNorm, Sight, Stack
from mm.tables import Rule, Table, rule

KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
         "qwen3": "Qwen3ForCausalLM"}


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys, kind = Keys(config, where), config["model_type"]
    dim, depth = keys.positive("hidden_size"), keys.positive("num_hidden_layers")
    context = keys.positive("max_position_embeddings", 2048)
    norm = RMSNorm(eps=float(keys.take("rms_norm_eps", float, 1e-6)))
    mixer = attention_of(keys, kind, dim, norm, context)
    bias = keys.take("mlp_bias", bool, False)
    mlp = Mlp(hidden=keys.positive("intermediate_size"), act=act_of(keys, default="silu"), gated=True, up_bias=bias,
              down_bias=bias)
    sights = sights_of(keys, kind, depth)
    layers = tuple(Layer(mixer=replace(mixer, sight=sight), mlp=mlp, norm=norm) for sight in sights)
    spec = DecoderSpec(
        embed=Embed(vocab=keys.positive("vocab_size")), stack=Stack(dim=dim, layers=layers, final_norm=norm),
        context=context, head=LMHead(tied=keys.take("tie_word_embeddings", bool, False)))
    keys.done(HARMLESS)
    return spec


def attention_of(keys: Keys, kind: str, dim: int, norm: RMSNorm, context: int) -> Attention:
    heads = keys.positive("num_attention_heads")
    width = keys.positive("head_dim", max(dim // heads, 1))
    qkv_bias = kind == "qwen2" or keys.take("attention_bias", bool, False)
    return Attention(
        heads=heads, kv_heads=keys.positive("num_key_value_heads", heads), head_dim=width, q_bias=qkv_bias,
        k_bias=qkv_bias, v_bias=qkv_bias, out_bias=qkv_bias and kind != "qwen2", rope=rope_of(keys, context),
        qk_norm=QKNorm(norm=norm) if kind == "qwen3" else None,
        dropout=float(keys.take("attention_dropout", (int, float), 0.0)))


def sights_of(keys: Keys, kind: str, depth: int) -> list[Sight]:
    """The window of each layer: everywhere in Mistral, by `layer_types` or above `max_window_layers` in Qwen."""
    window, types = keys.take("sliding_window", int, None), keys.take("layer_types", list, None)
    used, lowest = keys.take("use_sliding_window", bool, kind == "mistral"), keys.take("max_window_layers", int, 0)
    if not used or window is None:
        return [CAUSAL] * depth
    near = Sight(left=window - 1, right=0)
    if types is None:
        types = ["sliding_attention" if i >= lowest or kind == "mistral" else "full_attention" for i in range(depth)]
    return [near if kind == "sliding_attention" else CAUSAL for kind in types]


# ------------------------------------------------------------------------------------- spec to config
def from_spec(kind: str, spec: DecoderSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class of this `kind` cannot hold."""
    layer = spec.stack.layers[0]
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention) or not isinstance(mlp, Mlp) or mlp.act not in TO_HF or mixer.rope is None:
        raise InputError(f"the hf layout of {kind} has layers of attention with rope and one MLP")
    sights = [one.mixer.sight for one in spec.stack.layers]
    windows = [sight.left + 1 for sight in sights if sight.left is not None]
    config = {
        "architectures": [KINDS[kind]], "model_type": kind, "vocab_size": spec.embed.vocab,
        "hidden_size": spec.stack.dim, "num_hidden_layers": len(spec.stack.layers),
        "intermediate_size": mlp.hidden, "hidden_act": TO_HF[mlp.act], "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "rms_norm_eps": layer.norm.eps,
        "max_position_embeddings": spec.context, "rope_parameters": rope_config(mixer.rope, mixer.head_dim),
        "tie_word_embeddings": spec.head.tied}
    if kind == "llama":
        config |= {"attention_bias": mixer.q_bias, "mlp_bias": mlp.up_bias}
    if kind == "mistral":
        config["sliding_window"] = windows[0] if windows else None
    if kind.startswith("qwen") and windows:
        config |= {"use_sliding_window": True, "sliding_window": windows[0], "layer_types": [
            "full_attention" if sight.left is None else "sliding_attention" for sight in sights]}
    if kind == "qwen3":
        config["attention_bias"] = mixer.q_bias
    ensure_kept(spec, to_spec(config, "config"), f"hf ({kind})")
    return config


# ------------------------------------------------------------------------------------- weights
def table(spec: DecoderSpec, names: Iterable[str]) -> Table:
    theirs, ours = "model.layers.{n}.", "stack.blocks.{n}."
    rules = [
        rule("model.embed_tokens.weight", "embed.tokens.weight"), rule("model.norm.weight", "stack.final_norm.weight"),
        rule("lm_head.weight", "head.weight"),
        *qkv_rules(theirs + "self_attn.", ours + "mixer.", spec.stack.layers[0].mixer),
        *block_rules(theirs, ours)]
    ignored = {"model.layers.{n}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER}
    return Table(tuple(rules), ignored | ({"lm_head.weight": TIED} if spec.head.tied else {}))


def block_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        rule(theirs + "self_attn.o_proj.{x}", ours + "mixer.out.{x}"),
        *(rule(f"{theirs}self_attn.{name}.weight", f"{ours}mixer.{name}.weight") for name in ("q_norm", "k_norm")),
        *(rule(f"{theirs}mlp.{part}_proj.{{x}}", f"{ours}mlp.{part}.{{x}}") for part in ("gate", "up", "down")),
        rule(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"),
        rule(theirs + "post_attention_layernorm.weight", ours + "mlp_norm.weight")]


def family(kind: str) -> Family:
    return Family(
        layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, table=table,
        recognise=lambda config: config.get("model_type") == kind, from_spec=lambda spec: from_spec(kind, spec),
        files=lambda config, extras: {CONFIG: config | special_ids(extras)})


def special_ids(extras: Extras) -> dict[str, Any]:
    """Start, end and padding, as transformers' generation reads them."""
    t = extras.tokenizer
    return {} if t is None else {"bos_token_id": t.bos_id, "eos_token_id": t.eos_id, "pad_token_id": t.pad_id}


LLAMA_KINDS = tuple(family(kind) for kind in KINDS)
