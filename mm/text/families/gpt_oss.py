"""transformers' GPT-OSS: sinks, a window in every other layer, YaRN, clamped experts with biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule, rule
from mm.errors import InputError
from mm.spec import Clamp, DecoderSpec, Layer, Mlp, Moe, Router
from mm.text.families.decoder import (
    FULL,
    PRE_NORMS,
    SLIDING,
    Kind,
    Size,
    attention_config,
    attention_of,
    attention_rules,
    family,
    norm_of,
    norm_rules,
    types_of,
    window_of,
    windows,
)
from mm.text.families.experts import (
    DEALT,
    DEALT_MXFP4,
    DEALT_TRANSPOSED,
    MXFP4,
    TRANSPOSED,
    count_of,
    fused_rules,
    leave_training,
    mixture,
)

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}
SLOPE = 1.702  # of the sigmoid in the experts' unit, as in `quick_gelu`


def layers(keys: Keys, size: Size) -> list[Layer]:
    if keys.left.get("rope_parameters") is None and keys.left.get("rope_scaling") is None:
        keys.left["rope_scaling"] = YARN
    mixer = attention_of(keys, size, sinks=True)
    moe = Moe(experts=count_of(keys, 128), chosen=chosen_of(keys), expert=expert_of(keys),
              router=Router(score="softmax_chosen", bias=True))
    types = types_of(keys, size, [FULL if i % 2 else SLIDING for i in range(size.depth)])
    window, norm = keys.positive("sliding_window", 128), norm_of(keys, "scale_then_cast")
    leave_training(keys)
    keys.take("initial_context_length", int, None)  # said again by the rotary settings
    if (packing := keys.take("quantization_config", dict, {}).get("quant_method", "mxfp4")) != "mxfp4":
        raise InputError(f"{keys.where}: weights packed by {packing!r} are not supported, only mxfp4")
    return [Layer(mixer=replace(mixer, window=window_of(kind, window)), mlp=moe, norm=norm) for kind in types]


def chosen_of(keys: Keys) -> int:
    """`experts_per_token` is the older name, kept beside the newer one."""
    older = keys.positive("experts_per_token", 4)
    return keys.positive("num_experts_per_tok", older)


def expert_of(keys: Keys) -> Mlp:
    """Gated by x sigmoid(1.702 x), whatever `hidden_act` says. Raises InputError for another slope."""
    slope = keys.take("swiglu_alpha", (int, float), SLOPE)
    if slope != SLOPE:
        raise InputError(f"{keys.where}: a swiglu_alpha of {slope} is not supported, only {SLOPE}")
    keys.take("hidden_act", str, None)
    return Mlp(hidden=keys.positive("intermediate_size"), act="quick_gelu", gated=True,
               clamp=Clamp(limit=float(keys.take("swiglu_limit", (int, float), 7.0))))


def config(spec: DecoderSpec) -> dict[str, Any]:
    moe, (window, types) = mixture(spec), windows(spec)
    if moe.expert.clamp is None:
        raise InputError("the hf layout of gpt_oss has experts whose gate is clamped")
    return attention_config(spec) | {
        "attention_bias": spec.stack.layers[0].mixer.q_bias, "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.chosen, "intermediate_size": moe.expert.hidden, "sliding_window": window or 128,
        "swiglu_limit": moe.expert.clamp.limit, "layer_types": types}


def rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    packed, experts = theirs + "mlp.experts", ours + "mlp.experts"
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *norm_rules(theirs, ours, PRE_NORMS),
            rule(theirs + "self_attn.sinks", ours + "mixer.sinks"),
            *fused_rules(packed, experts, DEALT_TRANSPOSED, TRANSPOSED), *packed_rules(packed, experts),
            rule(packed + ".gate_up_proj_bias", (experts + ".gate.bias", experts + ".up.bias"), DEALT),
            rule(packed + ".down_proj_bias", experts + ".down.bias"),
            rule(theirs + "mlp.router.{x}", ours + "mlp.router.{x}")]


def packed_rules(theirs: str, ours: str) -> list[Rule]:
    """The published files' experts, in four bits."""
    both, down = theirs + ".gate_up_proj_", theirs + ".down_proj_"
    return [rule((both + "blocks", both + "scales"), (ours + ".gate.weight", ours + ".up.weight"), DEALT_MXFP4),
            rule((down + "blocks", down + "scales"), ours + ".down.weight", MXFP4)]


GPT_OSS = family(Kind(
    model_type="gpt_oss", name="GptOssForCausalLM", layers=layers, config=config, rules=rules,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "attention_bias": True, "head_dim": 64,
              "num_key_value_heads": 8, "max_position_embeddings": 131072}))
