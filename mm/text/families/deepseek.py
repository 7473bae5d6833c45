"""transformers' DeepSeek-V2 and V3: latent attention, dense layers, then experts in groups, heads that look ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys, Opened
from mm.checkpoint.files import Folder
from mm.checkpoint.tables import Rule, fused, rule
from mm.errors import InputError
from mm.spec import CAUSAL, DecoderSpec, Groups, Latent, Layer, Mlp, Moe, Rope, Router, Yarn
from mm.text.families.decoder import PRE_NORMS, Kind, Size, family, mlp_of, mlp_rules, norm_of, norm_rules, table
from mm.text.families.experts import NAMES, expert_rules, fused_rules, leave_training, mixture
from mm.text.families.hf import TO_HF, rope_config, rope_of

COPY = "a copy of the model's own embeddings or head, which the heads that look ahead share"
SIZES = {"kv_rank": "kv_lora_rank", "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim",
         "value_dim": "v_head_dim"}
HEAD = (("enorm", "token_norm"), ("hnorm", "hidden_norm"), ("eh_proj", "project"),
        ("shared_head.norm", "stack.final_norm"))


# ------------------------------------------------------------------------------------- config to spec
def layers(keys: Keys, size: Size, router: Router) -> list[Layer]:
    expect(keys, moe_layer_freq=1, mlp_bias=False)
    mixer, norm, dense = latent_of(keys, size), norm_of(keys), mlp_of(keys)
    expert = replace(dense, hidden=keys.positive("moe_intermediate_size"))
    shared = replace(expert, hidden=expert.hidden * keys.positive("n_shared_experts"))
    moe = Moe(experts=keys.positive("n_routed_experts"), chosen=keys.positive("num_experts_per_tok"), expert=expert,
              router=router, shared=shared)
    first = keys.take("first_k_dense_replace", int, 0)
    leave_training(keys)
    for name in ("aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim"):  # training, and what follows
        keys.take(name, (bool, int, float), None)
    return [Layer(mixer=mixer, mlp=dense if i < first else moe, norm=norm) for i in range(size.depth)]


def latent_of(keys: Keys, size: Size) -> Latent:
    heads = keys.positive("num_attention_heads")
    expect(keys, num_key_value_heads=heads)
    sizes = {mine: keys.positive(theirs) for mine, theirs in SIZES.items()}
    layout = "interleaved" if keys.take("rope_interleave", bool, True) else "half"
    rope = replace(rope_of(keys, size.context), layout=layout)
    return Latent(heads=heads, **sizes, rope=rope, q_rank=keys.take("q_lora_rank", int, None), window=CAUSAL,
                  bias=keys.take("attention_bias", bool, False), scale=scale_of(rope, sizes),
                  dropout=float(keys.take("attention_dropout", (int, float), 0.0)))


def scale_of(rope: Rope, sizes: dict[str, int]) -> float | None:
    """YaRN also makes scores larger: by the square of 0.1 mscale_all ln(factor) + 1."""
    yarn = rope.scaling
    if not isinstance(yarn, Yarn) or not yarn.mscale_all or yarn.factor <= 1:
        return None
    return (sizes["nope_dim"] + sizes["rope_dim"]) ** -0.5 * (0.1 * yarn.mscale_all * math.log(yarn.factor) + 1) ** 2


def expect(keys: Keys, **wanted: Any) -> None:
    """Raises InputError for keys that have another value than the only one supported."""
    for name, value in wanted.items():
        given = keys.take(name, type(value), value)
        if given != value:
            raise InputError(f"{keys.where}: {name} should be {value!r}, not {given!r}")


def v2(keys: Keys, size: Size) -> list[Layer]:
    """The best experts by softmax, of all or of the groups with the best expert."""
    expect(keys, scoring_func="softmax", norm_topk_prob=False)
    groups = groups_of(keys, "max")
    limited = keys.take("topk_method", str, "greedy")
    if limited not in ("greedy", "group_limited_greedy"):
        raise InputError(f"{keys.where}: topk_method should be greedy or group_limited_greedy, not {limited!r}")
    return layers(keys, size, Router(scale=float(keys.take("routed_scaling_factor", (int, float), 1.0)),
                                     groups=groups if limited == "group_limited_greedy" else None))


def v3(keys: Keys, size: Size) -> list[Layer]:
    """The best experts by a sigmoid and a correction, of the groups with the best pair of experts."""
    expect(keys, scoring_func="sigmoid", topk_method="noaux_tc")
    router = Router(score="sigmoid", correction=True, renormalise=keys.take("norm_topk_prob", bool, True),
                    scale=float(keys.take("routed_scaling_factor", (int, float), 2.5)), groups=groups_of(keys, "top2"))
    return layers(keys, size, router)


def groups_of(keys: Keys, by: str) -> Groups:
    return Groups(count=keys.positive("n_group", 1), chosen=keys.positive("topk_group", 1), by=by)


def ahead(keys: Keys, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Heads of the last layer's kind, which has experts."""
    return (layers[-1],) * keys.take("num_nextn_predict_layers", int, 0)


# ------------------------------------------------------------------------------------- spec to config
def config(spec: DecoderSpec) -> dict[str, Any]:
    """The keys of both. Raises InputError for layers of another kind."""
    mixer, moe, stack = spec.stack.layers[0].mixer, mixture(spec), spec.stack
    if not isinstance(mixer, Latent) or moe.shared is None:
        raise InputError("the hf layout of this kind has layers of latent attention and experts, one of them shared")
    dense = [layer.mlp for layer in stack.layers if isinstance(layer.mlp, Mlp)]
    groups = moe.router.groups
    return {theirs: getattr(mixer, mine) for mine, theirs in SIZES.items()} | {
        "num_attention_heads": mixer.heads, "num_key_value_heads": mixer.heads, "q_lora_rank": mixer.q_rank,
        "rope_parameters": rope_config(mixer.rope, mixer.rope_dim), "attention_bias": mixer.bias,
        "intermediate_size": (dense or [moe.expert])[0].hidden, "first_k_dense_replace": len(dense),
        "hidden_act": TO_HF[moe.expert.act], "moe_intermediate_size": moe.expert.hidden,
        "n_routed_experts": moe.experts, "n_shared_experts": moe.shared.hidden // moe.expert.hidden,
        "num_experts_per_tok": moe.chosen, "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.scale,
        **({"n_group": groups.count, "topk_group": groups.chosen} if groups else {})}


def v2_config(spec: DecoderSpec) -> dict[str, Any]:
    return config(spec) | {"topk_method": "group_limited_greedy" if mixture(spec).router.groups else "greedy"}


def v3_config(spec: DecoderSpec) -> dict[str, Any]:
    rotated = spec.stack.layers[0].mixer.rope.layout
    return config(spec) | {"rope_interleave": rotated == "interleaved", "num_nextn_predict_layers": len(spec.ahead)}


# ------------------------------------------------------------------------------------- weights
def rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    """Heads that look ahead come first: they lie behind the last layer, under its names."""
    found = []
    for i in range(len(spec.ahead)):
        source, head = theirs.replace("{n}", str(len(spec.stack.layers) + i)), f"ahead.{i}."
        found += norm_rules(source, head, HEAD)
        found += block_rules(source, head + "stack.blocks.0.", spec)
    return found + block_rules(theirs, ours, spec)


def block_rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    experts = (theirs + "mlp.experts", ours + "mlp.experts")
    return [
        *latent_rules(theirs + "self_attn.", ours + "mixer.", spec.stack.layers[0].mixer), *mlp_rules(theirs, ours),
        *norm_rules(theirs, ours, PRE_NORMS), *expert_rules(*experts, mixture(spec).experts), *fused_rules(*experts),
        rule(theirs + "mlp.gate.weight", ours + "mlp.router.weight"),
        rule(theirs + "mlp.gate.e_score_correction_bias", ours + "mlp.router.correction"),
        *(rule(f"{theirs}mlp.shared_experts.{name}.weight", f"{ours}mlp.shared.{mine}.weight")
          for mine, name in NAMES.items())]


def latent_rules(theirs: str, ours: str, mixer: Latent) -> list[Rule]:
    """Projections of one input are one; without `q_rank`, that of the queries has no bias."""
    query, both = "q_a_proj" if mixer.q_rank else "q_proj", mixer.kv_rank + mixer.rope_dim
    sizes = (mixer.q_rank or mixer.heads * (mixer.nope_dim + mixer.rope_dim), both)
    names = [theirs + name for name in (query, "kv_a_proj_with_mqa")]
    bias = fused(*sizes) if mixer.q_rank else fused(both)
    return [
        rule(tuple(name + ".weight" for name in names), ours + "qkv.weight", fused(*sizes)),
        rule(tuple(name + ".bias" for name in names[not mixer.q_rank:]), ours + "qkv.bias", bias),
        *norm_rules(theirs, ours, (("q_a_layernorm", "q_norm"), ("kv_a_layernorm", "kv_norm"), ("q_b_proj", "q_up"),
                                   ("kv_b_proj", "kv_up"))),
        rule(theirs + "o_proj.{x}", ours + "out.{x}")]


def found_heads(folder: Folder, opened: Opened) -> Opened:
    """transformers writes how many heads look ahead, but not the heads: a model without them is as whole."""
    first = f"model.layers.{len(opened.spec.stack.layers)}."
    if not opened.spec.ahead or any(name.startswith(first) for name in opened.weights.shapes):
        return opened
    spec = replace(opened.spec, ahead=())
    return replace(opened, spec=spec, table=table(V3, spec))


V2 = Kind(model_type="deepseek_v2", name="DeepseekV2ForCausalLM", layers=v2, config=v2_config, rules=rules)
V3 = Kind(model_type="deepseek_v3", name="DeepseekV3ForCausalLM", layers=v3, config=v3_config, rules=rules, ahead=ahead,
          ignored={f"model.layers.{{n}}.{name}.weight": COPY for name in ("embed_tokens", "shared_head.head")})
DEEPSEEK_KINDS = (family(V2), replace(family(V3), complete=found_heads))
