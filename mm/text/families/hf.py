"""What transformers' language models share: config keys, rotary settings, and the names of a Llama-shaped decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mm.checkpoint.family import Extras, Keys
from mm.checkpoint.tables import Rule, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import Attention as AttentionSpec
from mm.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, Yarn

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2"}
TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
         "relu2": "relu2"}
# Keys that no forward pass of these models reads: bookkeeping, initialisation, generation, training.
HARMLESS = frozenset("""
    _name_or_path _commit_hash _attn_implementation_autoset architectures model_type transformers_version torch_dtype
    dtype auto_map initializer_range initializer_factor bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id use_cache return_dict output_hidden_states output_attentions torchscript pruned_heads
    is_encoder_decoder is_decoder add_cross_attention tie_encoder_decoder gradient_checkpointing pretraining_tp
    max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty
    length_penalty id2label label2id num_labels tokenizer_class problem_type task_specific_params
    chunk_size_feed_forward cross_attention_hidden_size use_bfloat16 tf_legacy_loss finetuning_task prefix
""".split())  # noqa: SIM905
ROTARY_BUFFER = "a buffer that old files carry; rotations are computed from positions"
GATE_UP = WeightTransform(lambda xs: list(xs[0].chunk(2)), lambda xs: [torch.cat(list(xs))])  # one to two
TIED = "a copy of the token embeddings, to which the head is tied"


def act_of(keys: Keys, name: str = "hidden_act", default: Any = ...) -> str:
    act = keys.take(name, str, default)
    if act not in ACTS:
        raise InputError(f"{keys.where}: {name} should be one of {', '.join(ACTS)}, not {act!r}")
    return ACTS[act]


def answer_ids(keys: Keys, start: int, end: int) -> dict[str, Any]:
    """What an encoder-decoder's answers begin and end with: `start` and `end` of its spec."""
    first, forced = keys.take("decoder_start_token_id", int, start), keys.take("forced_bos_token_id", int, None)
    return {"start": (first,) if forced is None else (first, forced), "end": keys.take("eos_token_id", int, end)}


def padding_id(extras: Extras) -> dict[str, Any]:
    return {} if extras.tokenizer is None else {"pad_token_id": extras.tokenizer.pad_id}


def rope_of(keys: Keys, context: int, theta: float = 10000.0, *, head_dim: int | None = None,
            original: int | None = None, parameters: Mapping[str, Any] | None = None) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` before; `parameters`
    are those of one kind of layer. head_dim: for a kind that may rotate a part of it; original: the context before
    scaling, where that stands outside. Raises InputError."""
    number = (int, float)
    base, old = keys.take("rope_theta", number, theta), keys.take("rope_scaling", dict, None)
    share = keys.take("partial_rotary_factor", number, 1.0)
    given = parameters or keys.take("rope_parameters", dict, None) or old or {}
    told = Keys({"rope_theta": base, "partial_rotary_factor": share, "original_max_position_embeddings": original}
                | {name: value for name, value in given.items() if value is not None}, f"{keys.where}: rope_parameters")
    theta, share = float(told.take("rope_theta", number)), told.take("partial_rotary_factor", number)
    kind = told.take("rope_type", str, None) or told.take("type", str, "default")
    told.left.pop("type", None)
    if share != 1 and head_dim is None:
        raise InputError(f"{told.where}: a partial_rotary_factor of {share} is not supported for this kind of model")
    scaling = scaling_of(kind, told, context)
    told.done(("attention_factor",))
    return Rope(theta=theta, scaling=scaling, dim=None if share == 1 else int(head_dim * share))


def scaling_of(kind: str, told: Keys, context: int) -> Any:
    number = (int, float)
    original = told.take("original_max_position_embeddings", int, context)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(told.take("factor", number)))
        case "dynamic":
            return DynamicNTK(factor=float(told.take("factor", number)), original=original)
        case "llama3":
            return Llama3Scaling(factor=float(told.take("factor", number)), original=original,
                                 low=float(told.take("low_freq_factor", number)),
                                 high=float(told.take("high_freq_factor", number)))
        case "yarn":
            gain = told.take("attention_factor", number, None)
            return Yarn(factor=float(told.take("factor", number)), original=original,
                        beta_fast=float(told.take("beta_fast", number, 32.0)),
                        beta_slow=float(told.take("beta_slow", number, 1.0)),
                        mscale=float(told.take("mscale", number, 0.0)),
                        mscale_all=float(told.take("mscale_all_dim", number, 0.0)),
                        truncate=told.take("truncate", bool, True), gain=None if gain is None else float(gain))
        case "longrope" | "su":
            factor = told.take("factor", number, None) or context / original
            gain = told.take("attention_factor", number, None)
            return LongRope(original=original, factor=float(factor), gain=None if gain is None else float(gain),
                            short=tuple(map(float, told.take("short_factor", list))),
                            long=tuple(map(float, told.take("long_factor", list))))
    raise InputError(f"{told.where}: the rope_type {kind!r} is not known")


def rope_config(rope: Rope, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of transformers 5."""
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.dim not in (None, head_dim):
        out["partial_rotary_factor"] = rope.dim / head_dim
    match rope.scaling:
        case LinearScaling(factor=factor):
            out |= {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor=factor, original=original):
            out |= {"rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": original}
        case Llama3Scaling() as s:
            out |= {"rope_type": "llama3", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "low_freq_factor": s.low, "high_freq_factor": s.high}
        case Yarn() as s:
            out |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
            out |= {"mscale": s.mscale} if s.mscale else {}
            out |= {"mscale_all_dim": s.mscale_all} if s.mscale_all else {}
            out |= {} if s.gain is None else {"attention_factor": s.gain}
        case LongRope() as s:
            out |= {"rope_type": "longrope", "factor": s.factor, "original_max_position_embeddings": s.original,
                    "short_factor": list(s.short), "long_factor": list(s.long)}
            out |= {} if s.gain is None else {"attention_factor": s.gain}
    return out


def qkv_rules(theirs: str, ours: str, attention: AttentionSpec) -> list[Rule]:
    """`q_proj`, `k_proj` and `v_proj` side by side, with the biases that there are."""
    width = attention.head_dim
    sizes = (attention.heads * width, attention.kv_heads * width, attention.kv_heads * width)
    names = [f"{theirs}{part}_proj." for part in "qkv"]
    biased = [i for i, has in enumerate((attention.q_bias, attention.k_bias, attention.v_bias)) if has]
    rules = [rule(tuple(name + "weight" for name in names), ours + "qkv.weight", fused(*sizes))]
    if biased:
        theirs = tuple(names[i] + "bias" for i in biased)
        rules.append(rule(theirs, ours + "qkv.bias", fused(*(sizes[i] for i in biased))))
    return rules

