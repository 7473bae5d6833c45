"""transformers' Llama-shaped decoders: Llama, Mistral, Qwen2, Qwen3, SmolLM3 and OLMo 2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule
from mm.spec import CAUSAL, Attention, DecoderSpec, Layer, QKNorm, Window
from mm.text.families.decoder import (
    FULL,
    SLIDING,
    Kind,
    Size,
    attention_config,
    attention_of,
    attention_rules,
    family,
    mlp_config,
    mlp_of,
    mlp_rules,
    norm_of,
    norm_rules,
    pre_norm_rules,
    types_of,
    window_of,
    windows,
    with_qk_norm,
)


def plain(keys: Keys, mixer: Attention, windows: Iterable[Window]) -> list[Layer]:
    """Llama's layers, one per window."""
    layer = Layer(mixer=mixer, mlp=mlp_of(keys), norm=norm_of(keys))
    return [replace(layer, mixer=replace(mixer, window=one)) for one in windows]


def plain_config(spec: DecoderSpec) -> dict[str, Any]:
    return attention_config(spec) | mlp_config(spec)


def biases(spec: DecoderSpec) -> dict[str, Any]:
    layer = spec.stack.layers[0]
    return {"attention_bias": layer.mixer.q_bias, "mlp_bias": layer.mlp.up_bias}


# ------------------------------------------------------------------------------------- Llama, Mistral
def llama(keys: Keys, size: Size) -> list[Layer]:
    return plain(keys, attention_of(keys, size), [CAUSAL] * size.depth)


def mistral(keys: Keys, size: Size) -> list[Layer]:
    """One window for all layers."""
    window = keys.take("sliding_window", int, None)
    return plain(keys, attention_of(keys, size), [window_of(SLIDING, window)] * size.depth)


# ------------------------------------------------------------------------------------- Qwen
def qwen_windows(keys: Keys, size: Size) -> list[Window]:
    """A window in the layers from `max_window_layers` on, where windows are switched on at all."""
    lowest, window = keys.take("max_window_layers", int, 0), keys.take("sliding_window", int, None)
    if not keys.take("use_sliding_window", bool, False):
        window = None
    types = types_of(keys, size, [SLIDING if i >= lowest else FULL for i in range(size.depth)])
    return [window_of(kind, window) for kind in types]


def qwen2(keys: Keys, size: Size) -> list[Layer]:
    mixer = attention_of(keys, size, q_bias=True, k_bias=True, v_bias=True, out_bias=False)
    return plain(keys, mixer, qwen_windows(keys, size))


def qwen3(keys: Keys, size: Size) -> list[Layer]:
    return with_qk_norm(plain(keys, attention_of(keys, size), qwen_windows(keys, size)))


def qwen_config(spec: DecoderSpec) -> dict[str, Any]:
    window, types = windows(spec)
    told = {"use_sliding_window": True, "sliding_window": window, "layer_types": types} if window else {}
    return plain_config(spec) | told


# ------------------------------------------------------------------------------------- SmolLM3
def smollm3(keys: Keys, size: Size) -> list[Layer]:
    """Layers without positions between those with rope; only they may have a window."""
    every = keys.positive("no_rope_layer_interval", 4)
    rotated = keys.take("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(size.depth)])[:size.depth]
    window = keys.take("sliding_window", int, None)
    if not keys.take("use_sliding_window", bool, False):
        window = None
    types = types_of(keys, size, [FULL if window is None or has else SLIDING for has in rotated])
    layers = plain(keys, attention_of(keys, size), [window_of(kind, window) for kind in types])
    return [one if has else replace(one, mixer=replace(one.mixer, rope=None))
            for one, has in zip(layers, rotated, strict=True)]


def smollm3_config(spec: DecoderSpec) -> dict[str, Any]:
    return qwen_config(spec) | biases(spec) | {
        "no_rope_layers": [int(layer.mixer.rope is not None) for layer in spec.stack.layers]}


# ------------------------------------------------------------------------------------- OLMo 2
def olmo2(keys: Keys, size: Size) -> list[Layer]:
    """Norms after the branches, and over all query and all key heads at once."""
    norm = norm_of(keys, "scale_then_cast")
    mixer = attention_of(keys, size, qk_norm=QKNorm(norm=norm, over="flat"))
    return [Layer(mixer=mixer, mlp=mlp_of(keys), norm=norm, placement="post_branch")] * size.depth


def olmo2_rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    norms = (("post_attention_layernorm", "mixer_norm"), ("post_feedforward_layernorm", "mlp_norm"))
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *mlp_rules(theirs, ours),
            *norm_rules(theirs, ours, norms)]


KINDS = (
    Kind(model_type="llama", name="LlamaForCausalLM", layers=llama, rules=pre_norm_rules,
         config=lambda spec: plain_config(spec) | biases(spec)),
    Kind(model_type="mistral", name="MistralForCausalLM", layers=mistral, rules=pre_norm_rules,
         config=lambda spec: plain_config(spec) | {"sliding_window": windows(spec)[0]}),
    Kind(model_type="qwen2", name="Qwen2ForCausalLM", layers=qwen2, rules=pre_norm_rules, config=qwen_config),
    Kind(model_type="qwen3", name="Qwen3ForCausalLM", layers=qwen3, rules=pre_norm_rules,
         config=lambda spec: qwen_config(spec) | {"attention_bias": spec.stack.layers[0].mixer.q_bias}),
    Kind(model_type="smollm3", name="SmolLM3ForCausalLM", layers=smollm3, rules=pre_norm_rules, config=smollm3_config,
         defaults={"tie_word_embeddings": True, "rope_theta": 2e6}),
    Kind(model_type="olmo2", name="Olmo2ForCausalLM", layers=olmo2, rules=olmo2_rules,
         config=lambda spec: plain_config(spec) | {"attention_bias": spec.stack.layers[0].mixer.q_bias},
         defaults={"rms_norm_eps": 1e-5}))
LLAMA_KINDS = tuple(family(kind) for kind in KINDS)
