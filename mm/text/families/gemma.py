"""transformers' Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule
from mm.spec import Attention, DecoderSpec, Embed, Layer, LMHead, Rope
from mm.text.families.decoder import (
    FULL,
    SLIDING,
    Kind,
    Size,
    attention_config,
    attention_of,
    attention_rules,
    family,
    inside,
    mlp_config,
    mlp_of,
    mlp_rules,
    norm_of,
    norm_rules,
    types_of,
    window_of,
    windows,
    with_qk_norm,
)
from mm.text.families.hf import rope_config, rope_of

NORMS = (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "mixer_post_norm"),
         ("pre_feedforward_layernorm", "mlp_norm"), ("post_feedforward_layernorm", "mlp_post_norm"))
NUMBER = (int, float)


# ------------------------------------------------------------------------------------- config to spec
def layers_of(keys: Keys, mixers: Mapping[str, Attention], types: Sequence[str]) -> list[Layer]:
    """Sandwich layers whose attention is that of their type."""
    norm = norm_of(keys, "one_plus")
    keys.take("hidden_act", str, None)  # in old files beside hidden_activation, and not read
    mlp = mlp_of(keys, "hidden_activation")
    window, softcap = keys.take("sliding_window", int, None), float(keys.take("attn_logit_softcapping", NUMBER, 0.0))
    scale = keys.take("query_pre_attn_scalar", NUMBER) ** -0.5
    held = {kind: replace(mixer, window=window_of(kind, window), softcap=softcap, scale=scale)
            for kind, mixer in mixers.items()}
    return [Layer(mixer=held[kind], mlp=mlp, norm=norm, placement="sandwich") for kind in types]


def gemma2(keys: Keys, size: Size) -> list[Layer]:
    mixer = attention_of(keys, size)
    types = types_of(keys, size, [FULL if i % 2 else SLIDING for i in range(size.depth)])
    return layers_of(keys, {FULL: mixer, SLIDING: mixer}, types)


def gemma3(keys: Keys, size: Size) -> list[Layer]:
    """Layers with a window turn by a rope of their own."""
    every = keys.positive("sliding_window_pattern", keys.positive("_sliding_window_pattern", 6))
    types = types_of(keys, size, [SLIDING if (i + 1) % every else FULL for i in range(size.depth)])
    ropes = ropes_of(keys, size)
    mixer = attention_of(keys, size, rope=None)
    return with_qk_norm(layers_of(keys, {kind: replace(mixer, rope=rope) for kind, rope in ropes.items()}, types))


def ropes_of(keys: Keys, size: Size) -> dict[str, Rope]:
    """By layer type in new files; in old ones the layers with a window have a base of their own and no scaling."""
    near = float(keys.take("rope_local_base_freq", NUMBER, 10000.0))
    given = keys.take("rope_parameters", dict, {})
    if not set(given) & {FULL, SLIDING}:
        return {SLIDING: Rope(theta=near), FULL: rope_of(keys, size.context, 1e6, parameters=given)}
    keys.take("rope_theta", NUMBER, None), keys.take("rope_scaling", dict, None)
    thetas = {FULL: 1e6, SLIDING: near}
    return {kind: rope_of(keys, size.context, theta, parameters=given.get(kind)) for kind, theta in thetas.items()}


# ------------------------------------------------------------------------------------- spec to config
def config(spec: DecoderSpec) -> dict[str, Any]:
    mixer = spec.stack.layers[0].mixer
    told = attention_config(spec) | mlp_config(spec, "hidden_activation")
    window, types = windows(spec)
    scalar = (mixer.scale or mixer.head_dim ** -0.5) ** -2
    return told | {
        "layer_types": types, "sliding_window": window, "attention_bias": mixer.q_bias,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": mixer.softcap or None, "final_logit_softcapping": spec.head.softcap or None}


def config3(spec: DecoderSpec) -> dict[str, Any]:
    told = config(spec)
    ropes = dict(zip(told["layer_types"], (layer.mixer.rope for layer in spec.stack.layers), strict=True))
    return told | {"rope_parameters": {kind: rope_config(rope, told["head_dim"]) for kind, rope in ropes.items()}}


# ------------------------------------------------------------------------------------- the two
def embed(keys: Keys, size: Size) -> Embed:
    return Embed(vocab=keys.positive("vocab_size"), scale=size.dim**0.5)


def head(keys: Keys) -> LMHead:
    return LMHead(tied=keys.take("tie_word_embeddings", bool, False),
                  softcap=float(keys.take("final_logit_softcapping", NUMBER, 0.0)))


def rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *mlp_rules(theirs, ours),
            *norm_rules(theirs, ours, NORMS)]


SHARED = {"hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
          "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "sliding_window": 4096}
GEMMA2 = Kind(
    model_type="gemma2", name="Gemma2ForCausalLM", layers=gemma2, config=config, rules=rules, embed=embed, head=head,
    defaults=SHARED | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0,
                       "attn_logit_softcapping": 50.0})
GEMMA3 = Kind(
    model_type="gemma3_text", name="Gemma3ForCausalLM", layers=gemma3, config=config3, rules=rules, embed=embed,
    head=head, defaults=SHARED | {"max_position_embeddings": 131072, "vocab_size": 262208})
GEMMA_KINDS = (family(GEMMA2), family(GEMMA3),
               inside(GEMMA3, "gemma3", ("vision_tower.{name}", "multi_modal_projector.{name}")))
