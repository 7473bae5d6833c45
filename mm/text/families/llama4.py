"""transformers' Llama 4 text model: chunked attention, layers without rope between, experts that weigh their input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule, rule
from mm.errors import InputError
from mm.spec import (
    CAUSAL,
    Attention,
    DecoderSpec,
    L2Norm,
    Layer,
    Mlp,
    Moe,
    QKNorm,
    RMSNorm,
    Router,
    Temperature,
    Window,
)
from mm.text.families.decoder import (
    FULL,
    PRE_NORMS,
    Kind,
    Size,
    attention_config,
    attention_of,
    attention_rules,
    family,
    inside,
    norm_of,
    norm_rules,
)
from mm.text.families.experts import HALVES_TRANSPOSED, TRANSPOSED, count_of, fused_rules, leave_training, mixture
from mm.text.families.hf import TO_HF, act_of

CHUNKED = "chunked_attention"


# ------------------------------------------------------------------------------------- config to spec
def layers(keys: Keys, size: Size) -> list[Layer]:
    norm = norm_of(keys)
    mixers, mlps = mixers_of(keys, size, norm), mlps_of(keys, size)
    leave_training(keys)
    return [Layer(mixer=mixer, mlp=mlp, norm=norm) for mixer, mlp in zip(mixers, mlps, strict=True)]


def mixers_of(keys: Keys, size: Size, norm: RMSNorm) -> list[Attention]:
    """Layers with rope, interleaved, and normalised queries and keys; those without have a temperature instead."""
    mixer = attention_of(keys, size)
    rotated = replace(mixer, rope=replace(mixer.rope, layout="interleaved"))
    if keys.take("use_qk_norm", bool, True):
        rotated = replace(rotated, qk_norm=QKNorm(norm=L2Norm(eps=norm.eps), after_rope=True))
    slope, every = float(keys.take("attn_scale", (int, float), 0.1)), keys.positive("floor_scale", 8192)
    warm = Temperature(slope=slope, every=every) if keys.take("attn_temperature_tuning", (bool, int), True) else None
    still = replace(mixer, rope=None, temperature=warm)
    every = keys.positive("no_rope_layer_interval", 4)
    rotations = keys.take("no_rope_layers", list, None) or [int((i + 1) % every != 0) for i in range(size.depth)]
    chunk = keys.take("attention_chunk_size", int, None)
    types = keys.take("layer_types", list, [CHUNKED if rotation and chunk else FULL for rotation in rotations])
    if len(rotations) < size.depth or len(types) != size.depth or not set(types) <= {CHUNKED, FULL}:
        raise InputError(f"{keys.where}: no_rope_layers and layer_types should describe {size.depth} layers")
    windows = {FULL: CAUSAL, CHUNKED: Window(right=0, chunk=chunk)}
    return [replace(rotated if rotation else still, window=windows[kind]) 
            for rotation, kind in zip(rotations, types, strict=False)]


def mlps_of(keys: Keys, size: Size) -> list[Mlp | Moe]:
    expert = Mlp(hidden=keys.positive("intermediate_size", 8192), act=act_of(keys, default="silu"), gated=True,
                 up_bias=False, down_bias=False)
    dense = replace(expert, hidden=keys.positive("intermediate_size_mlp", 16384))
    moe = Moe(experts=count_of(keys, 16), chosen=keys.positive("num_experts_per_tok", 1), expert=expert, shared=expert,
              router=Router(score="sigmoid"), weigh="input")
    step = keys.positive("interleave_moe_layer_step", 1)
    mixed = keys.take("moe_layers", list, list(range(step - 1, size.depth, step)))
    return [moe if i in mixed else dense for i in range(size.depth)]


# ------------------------------------------------------------------------------------- spec to config
def config(spec: DecoderSpec) -> dict[str, Any]:
    moe, stack = mixture(spec), spec.stack.layers
    told = attention_config(spec)  # every layer is attention, one has rope
    mixers = [layer.mixer for layer in stack]
    dense = [layer.mlp for layer in stack if isinstance(layer.mlp, Mlp)]
    chunks = [mixer.window.chunk for mixer in mixers]
    rotated = next(mixer for mixer in mixers if mixer.rope is not None)
    return told | temperature_config(mixers) | {
        "attention_bias": rotated.q_bias, "use_qk_norm": rotated.qk_norm is not None,
        "num_local_experts": moe.experts, "num_experts_per_tok": moe.chosen, "intermediate_size": moe.expert.hidden,
        "intermediate_size_mlp": dense[0].hidden if dense else moe.expert.hidden,
        "hidden_act": TO_HF[moe.expert.act], "attention_chunk_size": next(filter(None, chunks), None),
        "layer_types": [CHUNKED if chunk else FULL for chunk in chunks],
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "moe_layers": [i for i, layer in enumerate(stack) if isinstance(layer.mlp, Moe)]}


def temperature_config(mixers: list[Attention]) -> dict[str, Any]:
    warm = next((mixer.temperature for mixer in mixers if mixer.temperature), None)
    told = {} if warm is None else {"attn_scale": warm.slope, "floor_scale": warm.every}
    return {"attn_temperature_tuning": warm is not None or all(mixer.rope for mixer in mixers)} | told


# ------------------------------------------------------------------------------------- weights
def rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    feed, mlp = theirs + "feed_forward.", ours + "mlp."
    parts = [(feed, mlp), (feed + "shared_expert.", mlp + "shared.")]
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *norm_rules(theirs, ours, PRE_NORMS),
            *fused_rules(feed + "experts", mlp + "experts", HALVES_TRANSPOSED, TRANSPOSED),
            rule(feed + "router.weight", mlp + "router.weight"),
            *(rule(f"{a}{part}_proj.weight", f"{b}{part}.weight") for a, b in parts for part in ("gate", "up", "down"))]


TEXT = Kind(
    model_type="llama4_text", name="Llama4ForCausalLM", layers=layers, config=config, rules=rules,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128, "num_key_value_heads": 8,
              "max_position_embeddings": 131072, "attention_chunk_size": 8192})
LLAMA4_KINDS = (family(TEXT), inside(TEXT, "llama4", ("vision_model.{name}", "multi_modal_projector.{name}")))
