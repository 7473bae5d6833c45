"""What transformers' vision encoders share: their config keys, their layers' names on disk, their labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.checkpoint.tables import Rule, fused, rule
from mm.errors import InputError
from mm.spec import Attention, LayerNorm, Stack

from ...spec import Projection, ViTSpec
from .common import Extras, Keys
from .hf_clip import ACTS, HARMLESS

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
TO_HF = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
PRETRAINING_ONLY = "of masked pretraining only"
HARMLESS = HARMLESS | {"encoder_stride", "out_features", "out_indices", "stage_names", "reshape_hidden_states",
                       "apply_layernorm", "use_mask_token", "pooler_output_size", "num_labels"}


def start(config: Mapping[str, Any], where: str, known: Mapping[str, str]) -> tuple[Keys, str]:
    """The config's keys, and what `known` calls its architecture."""
    keys = Keys(config, where)
    name = (keys.take("architectures", list, None) or [next(iter(known))])[0]
    if name not in known:
        raise InputError(f"{where}: the architecture {name} is not known, only {', '.join(known)}")
    return keys, known[name]


def attention(keys: Keys, dim: int, dropout: str = "attention_probs_dropout_prob", **more: Any) -> Attention:
    heads = keys.positive("num_attention_heads", 12)
    if dim % heads:
        raise InputError(f"{keys.where}: hidden_size {dim} cannot be split over {heads} heads")
    return Attention(heads=heads, kv_heads=heads, head_dim=dim // heads,
                     dropout=float(keys.take(dropout, (int, float), 0.0)), **more)


def act_of(keys: Keys, default: str = "gelu") -> str:
    act = keys.take("hidden_act", str, default)
    if act not in ACTS:
        raise InputError(f"{keys.where}: hidden_act should be one of {', '.join(ACTS)}, not {act!r}")
    return ACTS[act]


def norm_of(keys: Keys, eps: float) -> LayerNorm:
    return LayerNorm(eps=float(keys.take("layer_norm_eps", float, eps)))


def classes(config: Mapping[str, Any]) -> int:
    """How many classes a classifier has: transformers leaves the names out where there are two."""
    return len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    return tuple(str(names[i]) for i in sorted(names, key=int)) if all(str(i).isdigit() for i in names) else ()


def label_config(extras: Extras, proj: Projection | None, classifier: bool) -> dict[str, Any]:
    """`id2label` and back, with numbered names where there are none."""
    if not classifier or proj is None:
        return {}
    names = extras.labels or tuple(f"LABEL_{i}" for i in range(proj.dim))
    if len(names) != proj.dim:
        raise InputError(f"the model has {proj.dim} classes and {len(names)} labels")
    return {"id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)}}


def one_size(spec: ViTSpec, layout: str) -> tuple[int, int]:
    """(picture side, patch side) of a square tower. Raises InputError for any other."""
    sides = {*spec.image}, {*spec.patches.size}
    if any(len(side) > 1 for side in sides) or spec.patches.stride:
        raise InputError(f"the {layout} layout holds square pictures and patches side by side, not {spec.image} "
                         f"and {spec.patches}")
    return spec.image[0], spec.patches.size[0]


def layers_of(stack: Stack) -> dict[str, Any]:
    """The config keys of equal layers."""
    layer = next(iter(stack.layers), None)
    if layer is None or layer.mlp is None or not isinstance(layer.mixer, Attention):
        raise InputError("the hf layout holds layers of attention and MLP")
    if layer.mlp.act not in TO_HF or not isinstance(layer.norm, LayerNorm):
        raise InputError(f"the hf layout has no activation {layer.mlp.act} with {layer.norm}")
    return {"hidden_size": stack.dim, "num_hidden_layers": len(stack.layers), "hidden_act": TO_HF[layer.mlp.act],
            "num_attention_heads": layer.mixer.heads, "layer_norm_eps": layer.norm.eps}


def legacy_rules(theirs: str, dim: int, bias: bool = True) -> list[Rule]:
    """Attention of ViT, DeiT, AST and DINOv2, by the names that transformers writes."""
    t, o = f"{theirs}encoder.layer.{{n}}.attention.", "stack.blocks.{n}.mixer."
    parts = tuple(f"{t}attention.{name}." for name in ("query", "key", "value"))
    kinds = ("weight", "bias") if bias else ("weight",)
    return [*(rule(tuple(part + kind for part in parts), f"{o}qkv.{kind}", fused(dim, dim, dim)) for kind in kinds),
            rule(t + "output.dense.{x}", o + "out.{x}")]
