"""transformers' decoders with experts: Mixtral, Qwen3-MoE, GPT-OSS and Llama 4. Experts lie in one tensor each, or all
in one, gate and up side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Entry, Pieces, Values, always, extend, field, pair, unread
from mm.checkpoint.hf import act
from mm.checkpoint.tables import STACKED, WeightTransform
from mm.errors import InputError
from mm.spec import CAUSAL, Clamp, DecoderSpec, L2Norm, Mlp, Moe, QKNorm, Temperature, Window
from mm.text.families.decoder import (
    BIAS,
    FULL,
    LLAMA,
    SLIDING,
    WEIGHTS,
    Decoder,
    alternating,
    block,
    inside,
    one_window,
    side_by_side,
)
from mm.text.families.llama import BY_HEAD


def halves(x: Tensor) -> list[Tensor]:
    """(X, 2 I, ...) -> gate and up (X, I, ...), one after the other."""
    return list(x.chunk(2, 1))


def joined(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), 1)


def dealt(x: Tensor) -> list[Tensor]:
    """(X, 2 I, ...) -> gate and up (X, I, ...), row by row in turn."""
    return [x[:, ::2], x[:, 1::2]]


def riffled(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs), 2).flatten(1, 2)


HALVES = WeightTransform(lambda xs: halves(xs[0]), lambda xs: [joined(xs)])
HALVES_TRANSPOSED = WeightTransform(lambda xs: halves(xs[0].mT), lambda xs: [joined(xs).mT])
DEALT = WeightTransform(lambda xs: dealt(xs[0]), lambda xs: [riffled(xs)])
DEALT_TRANSPOSED = WeightTransform(lambda xs: dealt(xs[0].mT), lambda xs: [riffled(xs).mT])
TRANSPOSED = WeightTransform(lambda xs: [xs[0].mT], lambda xs: [xs[0].mT])


# Values of four bits (sign, two of exponent, one of mantissa), and how many share a scale: OCP Microscaling, MXFP4.
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SHARING = 32


def widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (..., G, 16) bytes of two values each, the low half first, scales (..., G) powers of two plus 127
    -> (..., 32 G), exact in bfloat16."""
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = torch.tensor(LEVELS, dtype=torch.bfloat16, device=blocks.device)[pairs.int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).to(torch.bfloat16).flatten(-2)


def packed_shapes(x: Tensor) -> list[Tensor]:
    """Empty blocks and scales of a weight (..., I): packed files are read, not written."""
    groups = -(-x.shape[-1] // SHARING)
    return [x.new_empty(*x.shape[:-1], groups, SHARING // 2), x.new_empty(*x.shape[:-1], groups)]


DEALT_MXFP4 = WeightTransform(lambda xs: dealt(widened(*xs)), lambda xs: packed_shapes(riffled(xs)))
MXFP4 = WeightTransform(lambda xs: [widened(*xs)], lambda xs: packed_shapes(xs[0]))


# ------------------------------------------------------------------------------------- fields and weights of experts
TRAINING = unread("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
PER_EXPERT = block({  # one tensor an expert: the layout of published files, and the one that is written
    "mlp.experts.[*].gate_proj.weight": "mlp.experts.gate.weight | stacked",
    "mlp.experts.[*].up_proj.weight": "mlp.experts.up.weight | stacked",
    "mlp.experts.[*].down_proj.weight": "mlp.experts.down.weight | stacked"})
TOGETHER = block({  # all experts in one tensor
    "mlp.experts.gate_up_proj": "mlp.experts.[gate up].weight | halves",
    "mlp.experts.down_proj": "mlp.experts.down.weight",
    "mlp.gate.weight": "mlp.router.weight"})


def transforms(spec: DecoderSpec) -> dict[str, WeightTransform]:
    return side_by_side(spec) | {
        "stacked": STACKED, "halves": HALVES, "halves transposed": HALVES_TRANSPOSED, "transposed": TRANSPOSED,
        "dealt": DEALT, "dealt transposed": DEALT_TRANSPOSED, "dealt packed": DEALT_MXFP4, "packed": MXFP4}


def number_of_experts(key: str, usual: Any = ...) -> Entry:
    """The field of the number of experts, read under either of its two names."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        given = [keys.take(name, int, None) for name in ("num_experts", "num_local_experts")]
        held = {one for one in given if one is not None} or {usual}
        if held == {...} or len(held) > 1 or min(held) < 1:
            raise InputError(f"{keys.where}: num_experts or num_local_experts should be one positive number, not "
                             f"{given}")
        return {"moe.experts": held.pop()}

    def write(pieces: Pieces) -> dict[str, Any]:
        if pieces.moe is None:
            raise InputError("the hf layout of this kind has layers with experts")
        return {key: pieces.moe.experts}
    return pair("num_experts", read, write)


def expert(hidden: str, usual: Any = ...) -> tuple[Entry, ...]:
    """The fields of gated experts without biases, which have the model's activation."""
    return (field(hidden, "expert.hidden", default=usual), act(place="expert.act", default="silu"),
            always(expert__gated=True, expert__up_bias=False, expert__down_bias=False))


# ------------------------------------------------------------------------------------- Mixtral
MIXTRAL_FIELDS = extend(
    LLAMA, *expert("intermediate_size"), one_window(), number_of_experts("num_local_experts", 8), TRAINING,
    field("num_experts_per_tok", "moe.chosen", default=2), always(router__score="softmax_chosen"))
MIXTRAL_WEIGHTS = WEIGHTS | block({
    "block_sparse_moe.experts.[*].w1.weight": "mlp.experts.gate.weight | stacked",
    "block_sparse_moe.experts.[*].w3.weight": "mlp.experts.up.weight | stacked",
    "block_sparse_moe.experts.[*].w2.weight": "mlp.experts.down.weight | stacked",
    "block_sparse_moe.gate.weight": "mlp.router.weight"}) | TOGETHER


# ------------------------------------------------------------------------------------- Qwen3-MoE
def sparse(keys: Keys, v: Values) -> dict[str, Any]:
    """Experts in every `decoder_sparse_step`-th layer but for those in `mlp_only_layers`."""
    every, only = keys.positive("decoder_sparse_step", 1), keys.take("mlp_only_layers", list, [])
    return {"each.mlp": ["mlp" if i in only or (i + 1) % every else "moe" for i in range(v["stack.depth"])],
            "expert.act": v["mlp.act"]}


def dense_layers(pieces: Pieces) -> dict[str, Any]:
    return {"mlp_only_layers": [i for i, layer in enumerate(pieces.layers) if isinstance(layer.mlp, Mlp)]}


QWEN3_FIELDS = extend(
    LLAMA, BIAS, BY_HEAD, one_window("use_sliding_window"), unread("max_window_layers"),  # windows: all layers or none
    number_of_experts("num_experts", 128), field("num_experts_per_tok", "moe.chosen", default=8),
    field("moe_intermediate_size", "expert.hidden", default=768), TRAINING,
    pair("mlp_only_layers", sparse, dense_layers),
    field("norm_topk_prob", "router.renormalise", kind=bool, default=False),
    always(expert__gated=True, expert__up_bias=lambda v: v["mlp.up_bias"],
           expert__down_bias=lambda v: v["mlp.down_bias"]))


# ------------------------------------------------------------------------------------- GPT-OSS
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}
SLOPE = 1.702  # of the sigmoid in the experts' unit, as in `quick_gelu`


def usual_yarn(keys: Keys, v: Values) -> None:
    if keys.left.get("rope_parameters") is None and keys.left.get("rope_scaling") is None:
        keys.left["rope_scaling"] = YARN


def clamped(keys: Keys, v: Values) -> dict[str, Any]:
    """Experts gated by x sigmoid(1.702 x), whatever `hidden_act` says. Raises InputError for another slope, and for
    weights that are packed otherwise."""
    if (slope := keys.take("swiglu_alpha", (int, float), SLOPE)) != SLOPE:
        raise InputError(f"{keys.where}: a swiglu_alpha of {slope} is not supported, only {SLOPE}")
    if (packing := keys.take("quantization_config", dict, {}).get("quant_method", "mxfp4")) != "mxfp4":
        raise InputError(f"{keys.where}: weights packed by {packing!r} are not supported, only mxfp4")
    return {"expert.clamp": Clamp(limit=float(keys.take("swiglu_limit", (int, float), 7.0)))}


def clamp_key(pieces: Pieces) -> dict[str, Any]:
    if pieces.at("expert.clamp") is None:
        raise InputError("the hf layout of gpt_oss has experts whose gate is clamped")
    return {"swiglu_limit": pieces.expert.clamp.limit}


def chosen_of(keys: Keys, v: Values) -> dict[str, Any]:
    """`experts_per_token` is the older name, kept beside the newer one."""
    older = keys.positive("experts_per_token", 4)
    return {"moe.chosen": keys.positive("num_experts_per_tok", older)}


OSS_FIELDS = (pair("yarn", usual_yarn), *extend(
    LLAMA, BIAS, field("intermediate_size", "expert.hidden"), number_of_experts("num_local_experts", 128), TRAINING,
    alternating(lambda i: FULL if i % 2 else SLIDING, 128), pair("swiglu_limit", clamped, clamp_key),
    pair("num_experts_per_tok", chosen_of, lambda pieces: {"num_experts_per_tok": pieces.at("moe.chosen")}),
    unread("hidden_act"), unread("initial_context_length"),  # said again by the rotary settings
    always(mixer__sinks=True, norm__order="scale_then_cast", router__score="softmax_chosen", router__bias=True,
           expert__act="quick_gelu", expert__gated=True)))
OSS_WEIGHTS = WEIGHTS | block({
    "self_attn.sinks": "mixer.sinks",
    "mlp.experts.gate_up_proj": "mlp.experts.[gate up].weight | dealt transposed",
    "mlp.experts.down_proj": "mlp.experts.down.weight | transposed",
    "mlp.experts.gate_up_proj_[blocks scales]": "mlp.experts.[gate up].weight | dealt packed",  # as published: 4 bits
    "mlp.experts.down_proj_[blocks scales]": "mlp.experts.down.weight | packed",
    "mlp.experts.gate_up_proj_bias": "mlp.experts.[gate up].bias | dealt",
    "mlp.experts.down_proj_bias": "mlp.experts.down.bias",
    "mlp.router.{x}": "mlp.router.{x}"})

# ------------------------------------------------------------------------------------- Llama 4
CHUNKED = "chunked_attention"


def llama4_layers(keys: Keys, v: Values) -> dict[str, Any]:
    """Layers with rope, interleaved, chunked, with normalised queries and keys; those without have a temperature
    instead. Experts in every `interleave_moe_layer_step`-th layer."""
    depth, rope = v["stack.depth"], replace(v["mixer.rope"], layout="interleaved")
    after = keys.take("use_qk_norm", bool, True)
    norm = QKNorm(norm=L2Norm(eps=v["norm.eps"]), after_rope=True) if after else None
    slope, every = float(keys.take("attn_scale", (int, float), 0.1)), keys.positive("floor_scale", 8192)
    warm = Temperature(slope=slope, every=every) if keys.take("attn_temperature_tuning", (bool, int), True) else None
    every = keys.positive("no_rope_layer_interval", 4)
    rotated = keys.take("no_rope_layers", list, None) or [int((i + 1) % every != 0) for i in range(depth)]
    chunk = keys.take("attention_chunk_size", int, None)
    types = keys.take("layer_types", list, [CHUNKED if has and chunk else FULL for has in rotated])
    if len(rotated) < depth or len(types) != depth or not set(types) <= {CHUNKED, FULL}:
        raise InputError(f"{keys.where}: no_rope_layers and layer_types should describe {depth} layers")
    step = keys.positive("interleave_moe_layer_step", 1)
    mixed = keys.take("moe_layers", list, list(range(step - 1, depth, step)))
    return {"each.rope": [rope if has else None for has in rotated[:depth]],
            "each.qk_norm": [norm if has else None for has in rotated[:depth]],
            "each.temperature": [None if has else warm for has in rotated[:depth]],
            "each.window": [Window(right=0, chunk=chunk) if kind == CHUNKED else CAUSAL for kind in types],
            "each.mlp": ["moe" if i in mixed else "mlp" for i in range(depth)]}


def llama4_keys(pieces: Pieces) -> dict[str, Any]:
    mixers = [layer.mixer for layer in pieces.layers]
    chunks = [mixer.window.chunk for mixer in mixers]
    warm = next((mixer.temperature for mixer in mixers if mixer.temperature), None)
    return {"use_qk_norm": pieces.mixer.qk_norm is not None,
            "attention_chunk_size": next(filter(None, chunks), None),
            "layer_types": [CHUNKED if chunk else FULL for chunk in chunks],
            "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
            "moe_layers": [i for i, layer in enumerate(pieces.layers) if isinstance(layer.mlp, Moe)],
            "attn_temperature_tuning": warm is not None or all(mixer.rope for mixer in mixers)} | (
                {} if warm is None else {"attn_scale": warm.slope, "floor_scale": warm.every})


LLAMA4_FIELDS = extend(
    LLAMA, BIAS, *expert("intermediate_size", 8192), field("intermediate_size_mlp", "mlp.hidden", default=16384),
    number_of_experts("num_local_experts", 16), field("num_experts_per_tok", "moe.chosen", default=1), TRAINING,
    pair("no_rope_layers", llama4_layers, llama4_keys),
    always(mlp__act=lambda v: v["expert.act"], moe__shared=lambda v: v.make("expert"), moe__weigh="input",
           router__score="sigmoid"))
LLAMA4_WEIGHTS = WEIGHTS | block({
    "mlp.gate_proj.{x}": "", "mlp.up_proj.{x}": "", "mlp.down_proj.{x}": "",
    **{f"feed_forward.{part}_proj.weight": f"mlp.{part}.weight" for part in ("gate", "up", "down")},
    **{f"feed_forward.shared_expert.{part}_proj.weight": f"mlp.shared.{part}.weight"
       for part in ("gate", "up", "down")},
    "feed_forward.experts.gate_up_proj": "mlp.experts.[gate up].weight | halves transposed",
    "feed_forward.experts.down_proj": "mlp.experts.down.weight | transposed",
    "feed_forward.router.weight": "mlp.router.weight"})

# ------------------------------------------------------------------------------------- all of them
LLAMA4 = Decoder(
    model_type="llama4_text", name="Llama4ForCausalLM", fields=LLAMA4_FIELDS, weights=LLAMA4_WEIGHTS,
    transforms=transforms,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128, "num_key_value_heads": 8,
              "max_position_embeddings": 131072, "attention_chunk_size": 8192})
MIXTRAL = Decoder(
    model_type="mixtral", name="MixtralForCausalLM", fields=MIXTRAL_FIELDS, weights=MIXTRAL_WEIGHTS,
    transforms=transforms, defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6})
QWEN3_MOE = Decoder(
    model_type="qwen3_moe", name="Qwen3MoeForCausalLM", fields=QWEN3_FIELDS, weights=WEIGHTS | PER_EXPERT | TOGETHER,
    transforms=transforms)
GPT_OSS = Decoder(
    model_type="gpt_oss", name="GptOssForCausalLM", fields=OSS_FIELDS, weights=OSS_WEIGHTS, transforms=transforms,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "attention_bias": True, "head_dim": 64,
              "num_key_value_heads": 8, "max_position_embeddings": 131072})
KINDS = (MIXTRAL.family(), QWEN3_MOE.family(), GPT_OSS.family(), LLAMA4.family(),
         inside(LLAMA4, "llama4", ("vision_model.{name}", "multi_modal_projector.{name}")))
