"""transformers' Llama-shaped decoders with experts: Mixtral and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule, rule
from mm.spec import Attention, DecoderSpec, Layer, Mlp, Moe, Router
from mm.text.families.decoder import (
    PRE_NORMS,
    SLIDING,
    Kind,
    Size,
    attention_config,
    attention_of,
    attention_rules,
    family,
    mlp_of,
    mlp_rules,
    norm_of,
    norm_rules,
    window_of,
    windows,
    with_qk_norm,
)
from mm.text.families.experts import count_of, expert_rules, fused_rules, leave_training, mixture
from mm.text.families.hf import TO_HF


def layers_of(keys: Keys, mixer: Attention, mlps: Sequence[Mlp | Moe], window: int | None) -> list[Layer]:
    """Llama's layers, one per mlp, all with the same window."""
    mixer, norm = replace(mixer, window=window_of(SLIDING, window)), norm_of(keys)
    leave_training(keys)
    return [Layer(mixer=mixer, mlp=mlp, norm=norm) for mlp in mlps]


# ------------------------------------------------------------------------------------- Mixtral
def mixtral(keys: Keys, size: Size) -> list[Layer]:
    moe = Moe(experts=count_of(keys, 8), chosen=keys.positive("num_experts_per_tok", 2), expert=mlp_of(keys),
              router=Router(score="softmax_chosen"))
    return layers_of(keys, attention_of(keys, size), [moe] * size.depth, keys.take("sliding_window", int, None))


def mixtral_config(spec: DecoderSpec) -> dict[str, Any]:
    moe = mixture(spec)
    return attention_config(spec) | {
        "num_local_experts": moe.experts, "num_experts_per_tok": moe.chosen, "intermediate_size": moe.expert.hidden,
        "hidden_act": TO_HF[moe.expert.act], "sliding_window": windows(spec)[0]}


def mixtral_rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    block, experts = theirs + "block_sparse_moe.", ours + "mlp.experts"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *norm_rules(theirs, ours, PRE_NORMS),
            *expert_rules(block + "experts", experts, mixture(spec).experts, names),
            *fused_rules(theirs + "mlp.experts", experts),
            *(rule(f"{theirs}{name}.gate.weight", ours + "mlp.router.weight") for name in ("block_sparse_moe", "mlp"))]


# ------------------------------------------------------------------------------------- Qwen3-MoE
def qwen3_moe(keys: Keys, size: Size) -> list[Layer]:
    """Experts in every `decoder_sparse_step`-th layer but for those in `mlp_only_layers`."""
    dense, every = mlp_of(keys), keys.positive("decoder_sparse_step", 1)
    moe = Moe(experts=count_of(keys, 128), chosen=keys.positive("num_experts_per_tok", 8),
              expert=replace(dense, hidden=keys.positive("moe_intermediate_size", 768)),
              router=Router(renormalise=keys.take("norm_topk_prob", bool, False)))
    only = keys.take("mlp_only_layers", list, [])
    mlps = [dense if i in only or (i + 1) % every else moe for i in range(size.depth)]
    window = keys.take("sliding_window", int, None)
    keys.take("max_window_layers", int, None)  # not read: windows are for all layers or none
    if not keys.take("use_sliding_window", bool, False):
        window = None
    return with_qk_norm(layers_of(keys, attention_of(keys, size), mlps, window))


def qwen3_moe_config(spec: DecoderSpec) -> dict[str, Any]:
    moe, window, layers = mixture(spec), windows(spec)[0], spec.stack.layers
    dense = [i for i, layer in enumerate(layers) if isinstance(layer.mlp, Mlp)]
    return attention_config(spec) | {
        "attention_bias": layers[0].mixer.q_bias, "num_experts": moe.experts, "num_experts_per_tok": moe.chosen,
        "moe_intermediate_size": moe.expert.hidden, "norm_topk_prob": moe.router.renormalise,
        "intermediate_size": layers[dense[0]].mlp.hidden if dense else moe.expert.hidden, "mlp_only_layers": dense,
        "hidden_act": TO_HF[moe.expert.act], "use_sliding_window": window is not None, "sliding_window": window}


def qwen3_moe_rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *norm_rules(theirs, ours, PRE_NORMS),
            *expert_rules(theirs + "mlp.experts", ours + "mlp.experts", mixture(spec).experts),
            *fused_rules(theirs + "mlp.experts", ours + "mlp.experts"), *mlp_rules(theirs, ours),
            rule(theirs + "mlp.gate.weight", ours + "mlp.router.weight")]


MOE_KINDS = (
    family(Kind(model_type="mixtral", name="MixtralForCausalLM", layers=mixtral, config=mixtral_config,
                rules=mixtral_rules, defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6})),
    family(Kind(model_type="qwen3_moe", name="Qwen3MoeForCausalLM", layers=qwen3_moe, config=qwen3_moe_config,
                rules=qwen3_moe_rules)))
