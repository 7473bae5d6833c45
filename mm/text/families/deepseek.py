"""transformers' DeepSeek-V2 and V3: latent attention, dense layers, then experts in groups, heads that look ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys, Opened
from mm.checkpoint.fields import Pieces, Values, always, expected, extend, field, pair, unread
from mm.checkpoint.files import Folder
from mm.checkpoint.hf import rope_config, rope_of
from mm.checkpoint.tables import WeightTransform, fused
from mm.errors import InputError
from mm.spec import DecoderSpec, Groups, Latent, Mlp, Yarn
from mm.text.families.decoder import LLAMA, Decoder, block
from mm.text.families.experts import TRAINING
from mm.text.families.experts import transforms as of_experts

COPY = "a copy of the model's own embeddings or head, which the heads that look ahead share"


# ------------------------------------------------------------------------------------- config
def rotated(keys: Keys, v: Values) -> dict[str, Any]:
    """Rotary positions, and with YaRN scores that are larger too: by the square of 0.1 mscale_all ln(factor) + 1."""
    layout = "interleaved" if keys.take("rope_interleave", bool, True) else "half"
    rope, width = replace(rope_of(keys, v["spec.context"]), layout=layout), v["mixer.nope_dim"] + v["mixer.rope_dim"]
    yarn = rope.scaling
    larger = isinstance(yarn, Yarn) and yarn.mscale_all and yarn.factor > 1
    scale = width ** -0.5 * (0.1 * yarn.mscale_all * math.log(yarn.factor) + 1) ** 2 if larger else None
    return {"mixer.rope": rope, "mixer.scale": scale}


def rotated_keys(pieces: Pieces) -> dict[str, Any]:
    if not isinstance(pieces.mixer, Latent) or pieces.shared is None:
        raise InputError("the hf layout of this kind has layers of latent attention and experts, one of them shared")
    return {"rope_parameters": rope_config(pieces.mixer.rope, pieces.mixer.rope_dim),
            "num_key_value_heads": pieces.mixer.heads}


def first_dense(keys: Keys, v: Values) -> dict[str, Any]:
    """Dense layers first, then layers with experts of the same kind."""
    first, depth = keys.take("first_k_dense_replace", int, 0), v["stack.depth"]
    expert = {name: v[f"mlp.{name}"] for name in ("act", "gated", "up_bias", "down_bias")}
    shared = Mlp(**expert, hidden=v["expert.hidden"] * keys.positive("n_shared_experts"))
    return {"each.mlp": ["mlp" if i < first else "moe" for i in range(depth)], "moe.shared": shared} | {
        f"expert.{name}": value for name, value in expert.items()}


def first_dense_keys(pieces: Pieces) -> dict[str, Any]:
    return {"first_k_dense_replace": sum(isinstance(layer.mlp, Mlp) for layer in pieces.layers),
            "n_shared_experts": pieces.shared.hidden // pieces.expert.hidden}


def groups(keys: Keys, by: str) -> Groups:
    return Groups(count=keys.positive("n_group", 1), chosen=keys.positive("topk_group", 1), by=by)


def group_keys(pieces: Pieces) -> dict[str, Any]:
    found = pieces.at("router.groups")
    return {"n_group": found.count, "topk_group": found.chosen} if found else {}


def limited(keys: Keys, v: Values) -> dict[str, Any]:
    """V2 chooses among all experts, or among the groups with the best expert."""
    found, method = groups(keys, "max"), keys.take("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise InputError(f"{keys.where}: topk_method should be greedy or group_limited_greedy, not {method!r}")
    return {"router.groups": found if method == "group_limited_greedy" else None}


DEEPSEEK = extend(
    LLAMA, field("num_attention_heads", "mixer.heads"), expected(num_key_value_heads=lambda v: v["mixer.heads"]),
    field("kv_lora_rank", "mixer.kv_rank"), field("qk_nope_head_dim", "mixer.nope_dim"),
    field("qk_rope_head_dim", "mixer.rope_dim"), field("v_head_dim", "mixer.value_dim"),
    pair("q_lora_rank", lambda keys, v: {"mixer.q_rank": keys.take("q_lora_rank", int, None)},
         lambda pieces: {"q_lora_rank": pieces.at("mixer.q_rank")}),
    field("attention_bias", "mixer.bias", kind=bool, default=False), expected(mlp_bias=False),
    expected(moe_layer_freq=1), always(mlp__up_bias=False, mlp__down_bias=False),
    pair("rope_parameters", lambda keys, v: None),  # after the widths of heads
    pair("rope", rotated, rotated_keys), always(mixer__is=Latent),
    field("moe_intermediate_size", "expert.hidden"), field("n_routed_experts", "moe.experts"),
    field("num_experts_per_tok", "moe.chosen"), pair("first_k_dense_replace", first_dense, first_dense_keys), TRAINING,
    unread("aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim"), unread("head_dim"))  # training, and what follows
V2 = extend(
    DEEPSEEK, pair("topk_method", limited, lambda pieces: group_keys(pieces) | {
        "topk_method": "group_limited_greedy" if pieces.router.groups else "greedy"}),
    expected(scoring_func="softmax"), expected(norm_topk_prob=False),
    field("routed_scaling_factor", "router.scale", kind=float, default=1.0))
V3 = extend(
    DEEPSEEK, expected(scoring_func="sigmoid", topk_method="noaux_tc"), always(router__score="sigmoid",
                                                                             router__correction=True),
    pair("n_group", lambda keys, v: {"router.groups": groups(keys, "top2")}, group_keys),
    field("norm_topk_prob", "router.renormalise", kind=bool, default=True),
    field("routed_scaling_factor", "router.scale", kind=float, default=2.5),
    pair("interleave", lambda keys, v: None,
         lambda pieces: {"rope_interleave": pieces.mixer.rope.layout == "interleaved"}),
    pair("num_nextn_predict_layers",  # heads of the last layer's kind, which has experts
         lambda keys, v: {"spec.ahead": keys.take("num_nextn_predict_layers", int, 0)},
         lambda pieces: {"num_nextn_predict_layers": pieces.spec.ahead}))

# ------------------------------------------------------------------------------------- weights
TOP = {"model.embed_tokens.weight": "embed.tokens.weight", "model.norm.weight": "stack.final_norm.weight",
       "lm_head.weight": "head.weight"}
BLOCK = {
    "input_layernorm.weight": "mixer_norm.weight",
    "self_attn.q_a_layernorm.weight": "mixer.q_norm.weight",
    "self_attn.q_b_proj.weight": "mixer.q_up.weight",
    "self_attn.kv_a_layernorm.weight": "mixer.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "mixer.kv_up.weight",
    "self_attn.o_proj.{x}": "mixer.out.{x}",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.gate_proj.{x}": "mlp.gate.{x}",
    "mlp.up_proj.{x}": "mlp.up.{x}",
    "mlp.down_proj.{x}": "mlp.down.{x}",
    "mlp.experts.[*].gate_proj.weight": "mlp.experts.gate.weight | stacked",
    "mlp.experts.[*].up_proj.weight": "mlp.experts.up.weight | stacked",
    "mlp.experts.[*].down_proj.weight": "mlp.experts.down.weight | stacked",
    "mlp.experts.gate_up_proj": "mlp.experts.[gate up].weight | halves",
    "mlp.experts.down_proj": "mlp.experts.down.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.correction",
    "mlp.shared_experts.gate_proj.weight": "mlp.shared.gate.weight",
    "mlp.shared_experts.up_proj.weight": "mlp.shared.up.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared.down.weight"}
DIRECT = {"self_attn.[q_proj kv_a_proj_with_mqa].weight": "mixer.qkv.weight | down",  # queries without a lower rank
          "self_attn.kv_a_proj_with_mqa.bias": "mixer.qkv.bias"}
LOWER = {"self_attn.[q_a_proj kv_a_proj_with_mqa].{x}": "mixer.qkv.{x} | down"}
AHEAD = {"enorm.weight": "token_norm.weight", "hnorm.weight": "hidden_norm.weight", "eh_proj.weight": "project.weight",
         "shared_head.norm.weight": "stack.final_norm.weight"}


def weights(spec: DecoderSpec) -> Mapping[str, str]:
    """Heads that look ahead come first: they lie behind the last layer, under its names."""
    rows = BLOCK | (LOWER if spec.stack.layers[0].mixer.q_rank else DIRECT)
    found = {}
    for i in range(len(spec.ahead)):
        theirs, ours = f"model.layers.{len(spec.stack.layers) + i}.", f"ahead.{i}."
        found |= block(AHEAD, theirs, ours) | block(rows, theirs, ours + "stack.blocks.0.")
    return found | TOP | block(rows)


def transforms(spec: DecoderSpec) -> dict[str, WeightTransform]:
    """Projections of one input are one of ours."""
    m = spec.stack.layers[0].mixer
    return of_experts(spec) | {"down": fused(m.q_rank or m.heads * (m.nope_dim + m.rope_dim), m.kv_rank + m.rope_dim)}


def found_heads(folder: Folder, opened: Opened) -> Opened:
    """transformers writes how many heads look ahead, but not the heads: a model without them is as whole."""
    first = f"model.layers.{len(opened.spec.stack.layers)}."
    if not opened.spec.ahead or any(name.startswith(first) for name in opened.weights.shapes):
        return opened
    spec = replace(opened.spec, ahead=())
    return replace(opened, spec=spec, table=THIRD.table(spec))


SECOND = Decoder(
    model_type="deepseek_v2", name="DeepseekV2ForCausalLM", fields=V2, weights=weights, transforms=transforms)
THIRD = Decoder(
    model_type="deepseek_v3", name="DeepseekV3ForCausalLM", fields=V3, weights=weights, transforms=transforms,
    ignored={f"model.layers.{{n}}.{name}.weight": COPY for name in ("embed_tokens", "shared_head.head")})
KINDS = (SECOND.family(), THIRD.family(complete=found_heads))
