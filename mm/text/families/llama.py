"""transformers' decoders that are Llama with changes: Mistral, Qwen2, Qwen3, SmolLM3, OLMo 2, Phi-3, Gemma 2 and 3."""

from __future__ import annotations

from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Pieces, Values, always, extend, field, pair, unread
from mm.checkpoint.hf import act, rope, rope_config, rope_of
from mm.checkpoint.tables import GATE_UP
from mm.errors import InputError
from mm.spec import LongRope, QKNorm, Rope
from mm.text.families.decoder import (
    BIAS,
    FULL,
    LLAMA,
    MLP_BIAS,
    SLIDING,
    WEIGHTS,
    Decoder,
    alternating,
    block,
    inside,
    one_window,
    types_of,
    window_of,
    windows,
)

BY_HEAD = always(mixer__qk_norm=lambda v: QKNorm(norm=v.make("norm")))  # queries and keys are normalised


# ------------------------------------------------------------------------------------- Qwen, SmolLM3
def qwen_windows(keys: Keys, v: Values) -> dict[str, Any]:
    """A window in the layers from `max_window_layers` on, or where there are no positions in SmolLM3, if windows are
    switched on at all."""
    lowest, window = keys.take("max_window_layers", int, 0), keys.take("sliding_window", int, None)
    window = window if keys.take("use_sliding_window", bool, False) else None
    rotated = v.get("each.rope")
    near = (lambda i: window is not None and not rotated[i]) if rotated else (lambda i: i >= lowest)
    types = types_of(keys, v, lambda i: SLIDING if near(i) else FULL)
    return {"each.window": [window_of(kind, window) for kind in types]}


def qwen_keys(pieces: Pieces) -> dict[str, Any]:
    window, types = windows(pieces.layers)
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": types} if window else {}


WINDOWS = pair("use_sliding_window", qwen_windows, qwen_keys)


def some_without_rope(keys: Keys, v: Values) -> dict[str, Any]:
    """SmolLM3: layers without positions between those with rope."""
    every, depth = keys.positive("no_rope_layer_interval", 4), v["stack.depth"]
    rotated = keys.take("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(depth)])[:depth]
    return {"each.rope": [v["mixer.rope"] if has else None for has in rotated]}


ROTATED = pair("no_rope_layers", some_without_rope, lambda pieces: {
    "no_rope_layers": [int(layer.mixer.rope is not None) for layer in pieces.layers]})

# ------------------------------------------------------------------------------------- Phi-3
PHI_ROPE = rope(head_dim=lambda keys, v: v["mixer.head_dim"],
                original=lambda keys, v: keys.take("original_max_position_embeddings", int, None))


def phi_original(pieces: Pieces) -> dict[str, Any]:
    """The original context, outside the rotary settings. Raises InputError for heads that do not share the width."""
    mixer = pieces.mixer
    if mixer.head_dim * mixer.heads != pieces.stack.dim:
        raise InputError("the hf layout of phi3 has heads that share its width")
    scaling = mixer.rope.scaling
    return {"original_max_position_embeddings": scaling.original if isinstance(scaling, LongRope) else
            pieces.spec.context}


PHI = extend(LLAMA, PHI_ROPE, one_window(), unread("resid_pdrop", "embd_pdrop"),
             pair("original", lambda keys, v: None, phi_original))
PHI_WEIGHTS = WEIGHTS | block({
    "self_attn.[q k v]_proj.{x}": "", "self_attn.qkv_proj.weight": "mixer.qkv.weight",
    "mlp.gate_proj.{x}": "", "mlp.up_proj.{x}": "", "mlp.gate_up_proj.weight": "mlp.[gate up].weight | halves"})


# ------------------------------------------------------------------------------------- Gemma
def scalar(scale: float) -> float:
    """Returns the number that a scale is the inverse root of, whole if it is nearly so."""
    found = scale ** -2
    return round(found) if abs(found - round(found)) < 1e-6 else found


def two_ropes(keys: Keys, v: Values) -> dict[str, Any]:
    """Gemma 3: layers with a window turn by a rope of their own. New files hold both by layer type; in old ones that of
    the layers with a window has a base alone."""
    number = (int, float)
    near = float(keys.take("rope_local_base_freq", number, 10000.0))
    given = keys.take("rope_parameters", dict, {})
    if set(given) & {FULL, SLIDING}:
        keys.take("rope_theta", number, None), keys.take("rope_scaling", dict, None)
        ropes = {kind: rope_of(keys, v["spec.context"], theta, parameters=given.get(kind))
                 for kind, theta in ((FULL, 1e6), (SLIDING, near))}
    else:
        ropes = {SLIDING: Rope(theta=near), FULL: rope_of(keys, v["spec.context"], 1e6, parameters=given)}
    every = keys.positive("sliding_window_pattern", keys.positive("_sliding_window_pattern", 6))
    types = types_of(keys, v, lambda i: SLIDING if (i + 1) % every else FULL)
    window = keys.take("sliding_window", int, None)
    return {"each.rope": [ropes[kind] for kind in types], "each.window": [window_of(kind, window) for kind in types],
            "mixer.rope": None}


def two_ropes_keys(pieces: Pieces) -> dict[str, Any]:
    window, types = windows(pieces.layers)
    ropes = {kind: rope_config(layer.mixer.rope or Rope(), layer.mixer.head_dim)
             for kind, layer in zip(types, pieces.layers, strict=True)}
    return {"layer_types": types, "sliding_window": window, "rope_parameters": ropes}


GEMMA = extend(
    LLAMA, BIAS, unread("hidden_act"),  # in old files beside hidden_activation, and not read
    act("hidden_activation"), always(norm__order="one_plus", layer__placement="sandwich",
                                     embed__scale=lambda v: v["stack.dim"] ** 0.5),
    field("attn_logit_softcapping", "mixer.softcap", kind=float, default=0.0, save=lambda cap: cap or None),
    field("final_logit_softcapping", "head.softcap", kind=float, default=0.0, save=lambda cap: cap or None),
    pair("query_pre_attn_scalar",
         lambda keys, v: {"mixer.scale": keys.take("query_pre_attn_scalar", (int, float)) ** -0.5},
         lambda pieces: {"query_pre_attn_scalar": scalar(pieces.at("mixer.scale") or pieces.mixer.head_dim ** -0.5)}))
GEMMA_WEIGHTS = WEIGHTS | block({
    "post_attention_layernorm.weight": "mixer_post_norm.weight",
    "pre_feedforward_layernorm.weight": "mlp_norm.weight",
    "post_feedforward_layernorm.weight": "mlp_post_norm.weight"})
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "sliding_window": 4096}

# ------------------------------------------------------------------------------------- all of them
LLAMA2 = Decoder(model_type="llama", name="LlamaForCausalLM", fields=extend(LLAMA, BIAS, MLP_BIAS))
MISTRAL = Decoder(model_type="mistral", name="MistralForCausalLM", fields=extend(LLAMA, one_window()))
QWEN2 = Decoder(
    model_type="qwen2", name="Qwen2ForCausalLM", fields=extend(LLAMA, WINDOWS, always(
        mixer__q_bias=True, mixer__k_bias=True, mixer__v_bias=True, mixer__out_bias=False)))
QWEN3 = Decoder(model_type="qwen3", name="Qwen3ForCausalLM", fields=extend(LLAMA, BIAS, WINDOWS, BY_HEAD))
SMOLLM3 = Decoder(
    model_type="smollm3", name="SmolLM3ForCausalLM", fields=extend(LLAMA, BIAS, MLP_BIAS, ROTATED, WINDOWS),
    defaults={"tie_word_embeddings": True, "rope_theta": 2e6})
OLMO2 = Decoder(  # norms after the branches, and over all query and all key heads at once
    model_type="olmo2", name="Olmo2ForCausalLM", defaults={"rms_norm_eps": 1e-5}, fields=extend(LLAMA, BIAS, always(
        layer__placement="post_branch", norm__order="scale_then_cast",
        mixer__qk_norm=lambda v: QKNorm(norm=v.make("norm"), over="flat"))),
    weights=WEIGHTS | block({"input_layernorm.weight": "", "post_attention_layernorm.weight": "mixer_norm.weight",
                             "post_feedforward_layernorm.weight": "mlp_norm.weight"}))
PHI3 = Decoder(  # of which Phi-3.5, Phi-4 and Phi-4-mini are: fused projections, partial rotation, LongRoPE
    model_type="phi3", name="Phi3ForCausalLM", fields=PHI, weights=PHI_WEIGHTS,
    transforms=lambda spec: {"halves": GATE_UP},
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096})
GEMMA2 = Decoder(
    model_type="gemma2", name="Gemma2ForCausalLM", weights=GEMMA_WEIGHTS,
    fields=extend(GEMMA, alternating(lambda i: FULL if i % 2 else SLIDING)),
    defaults=GEMMA_DEFAULTS | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0,
                               "attn_logit_softcapping": 50.0})
GEMMA3 = Decoder(
    model_type="gemma3_text", name="Gemma3ForCausalLM", weights=GEMMA_WEIGHTS,
    fields=extend(GEMMA, pair("rope_parameters", two_ropes, two_ropes_keys), BY_HEAD),
    defaults=GEMMA_DEFAULTS | {"max_position_embeddings": 131072, "vocab_size": 262208})
KINDS = (*(kind.family() for kind in (LLAMA2, MISTRAL, QWEN2, QWEN3, SMOLLM3, OLMO2, GEMMA2, GEMMA3)),
         inside(GEMMA3, "gemma3", ("vision_tower.{name}", "multi_modal_projector.{name}")), PHI3.family())
