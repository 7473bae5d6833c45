"""What timm's directories share: a `config.json` that names an architecture and its arguments. What those mean is read
off the module that timm makes of them, without memory for its weights. Follows timm 1.0.31."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mm.checkpoint.family import Extras
from mm.checkpoint.files import CONFIG
from mm.checkpoint.hf import FILES
from mm.checkpoint.tables import Table, fused, rules_of
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, Mlp, Norm, RMSNorm, Stack

from ...spec import Head, MaxPool, MeanMaxPool, MeanPool, Pool, ProbePool, Projection, TokenPool, ViTSpec
from .common import PRETRAINING_ONLY, TRANSFORMS, Family, ensure_kept, ratio

POOLS = {"token": TokenPool(), "avg": MeanPool(), "max": MaxPool(), "avgmax": MeanMaxPool()}
ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "relu": "relu"}
MODULES = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}


# ------------------------------------------------------------------------------------- config to module
def blueprint(config: Mapping[str, Any], where: str) -> nn.Module:
    """timm's module for a config, on the meta device. Raises InputError when timm cannot make it."""
    try:
        return built(json.dumps(config, sort_keys=True))
    except Exception as error:  # whatever a constructor raises at arguments of the wrong kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: timm cannot make {config.get('architecture')!r} from these arguments ({reason})"
                         ) from None


@lru_cache(maxsize=8)
def built(config: str) -> nn.Module:
    import timm
    from timm.models._hub import _parse_model_cfg

    pretrained, architecture, args = _parse_model_cfg(json.loads(config), {})
    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, pretrained_cfg=pretrained, **args).eval()


def bare(architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The least that timm needs to make a module."""
    return {"architecture": architecture, "model_args": dict(args),
            "pretrained_cfg": {"num_classes": args.get("num_classes", 0)}}


# ------------------------------------------------------------------------------------- module to spec
def spec_of(model: nn.Module, layer_of: Callable[[nn.Module], Layer], where: str, **more: Any) -> ViTSpec:
    """What all of timm's vision transformers say alike; `more` are the fields of the spec that are left. Dropout of
    positions and before the head is left out: only timm's own training has it."""
    return ViTSpec(**{
        "pre_norm": norm_of(model.norm_pre, where), "patch_dropout": getattr(model.patch_drop, "prob", 0.0),
        "stack": Stack(dim=model.embed_dim, layers=tuple(map(layer_of, model.blocks)),
                       final_norm=norm_of(model.norm, where))} | more)


def norm_of(norm: nn.Module, where: str) -> Norm | None:
    from timm.layers import RmsNorm

    match norm:
        case nn.Identity():
            return None
        case nn.LayerNorm(elementwise_affine=True):
            return LayerNorm(eps=norm.eps, bias=norm.bias is not None)
        case RmsNorm(elementwise_affine=True):
            return RMSNorm(eps=norm.eps)
    raise InputError(f"{where}: the norm {type(norm).__name__} is not supported")


def mlp_of(mlp: nn.Module, where: str) -> Mlp:
    from timm.layers import GluMlp, SwiGLU

    if getattr(mlp, "gate_last", False):
        raise InputError(f"{where}: an MLP whose second half is the gate is not supported")
    first = mlp.fc1_x if isinstance(mlp, SwiGLU) else mlp.fc1
    return Mlp(hidden=mlp.fc2.in_features, act=act_of(mlp.act, where), gated=isinstance(mlp, GluMlp | SwiGLU),
               up_bias=first.bias is not None, down_bias=mlp.fc2.bias is not None, inner_norm=norm_of(mlp.norm, where),
               dropout=mlp.drop1.p)


def act_of(act: nn.Module, where: str) -> str:
    name = type(act).__name__
    if name not in MODULES:
        raise InputError(f"{where}: the activation {name} is not supported")
    return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else MODULES[name]


def head_of(model: nn.Module, where: str, pools: Mapping[str, Pool]) -> Head:
    proj = Projection(dim=model.head.out_features, bias=True) if isinstance(model.head, nn.Linear) else None
    return Head(pool=pool_of(model, where, pools), norm=norm_of(model.fc_norm, where), proj=proj)


def pool_of(model: nn.Module, where: str, pools: Mapping[str, Pool]) -> Pool:
    pool, inside = model.attn_pool, getattr(model, "pool_include_prefix", None)
    if pool is not None:
        return ProbePool(heads=pool.num_heads, mlp=mlp_of(pool.mlp, where), norm=norm_of(pool.norm, where),
                         prefix=inside is None or inside or not model.num_prefix_tokens)
    if model.global_pool not in pools:
        raise InputError(f"{where}: global_pool should be {', '.join(pools)} or map, not {model.global_pool!r}")
    found = pools[model.global_pool]
    return type(found)(prefix=True) if inside and model.global_pool != "token" else found


# ------------------------------------------------------------------------------------- spec to module
def first_layer(spec: ViTSpec, title: str) -> Layer:
    """Raises InputError unless the first layer is attention and an MLP."""
    layer = next(iter(spec.stack.layers), None)
    if layer is None or layer.mlp is None or not isinstance(layer.mixer, Attention):
        raise InputError(f"timm's {title} holds layers of attention and MLP")
    return layer


def size_args(spec: ViTSpec) -> dict[str, Any]:
    """The arguments that all of timm's vision transformers have."""
    return {"img_size": list(spec.image), "patch_size": list(spec.patches.size), "in_chans": spec.patches.channels,
            "embed_dim": spec.stack.dim, "depth": len(spec.stack.layers),
            "num_classes": spec.head.proj.dim if spec.head.proj else 0}


def pool_args(spec: ViTSpec, title: str, pools: Mapping[str, Pool]) -> dict[str, Any]:
    pool = spec.head.pool
    if isinstance(pool, ProbePool):
        return {"global_pool": "map", "attn_pool_num_heads": pool.heads,
                "attn_pool_mlp_ratio": ratio(pool.mlp.hidden, spec.stack.dim)}
    name = next((name for name, known in pools.items() if known == pool), None)
    if name is None:
        raise InputError(f"timm's {title} has no pool like {pool}")
    return {"global_pool": name}


# ------------------------------------------------------------------------------------- weights
ROWS = {
    "norm_pre.{x}": "pre_norm.{x}", "norm.{x}": "stack.final_norm.{x}",
    "fc_norm.{x}": "head.norm.{x}", "head.{x}": "head.proj.{x}",
    "attn_pool.latent": "head.pool.probe | batched", "attn_pool.norm.{x}": "head.pool.norm.{x}",
    "attn_pool.q.{x}": "head.pool.attention.q.{x}", "attn_pool.kv.{x}": "head.pool.attention.kv.{x}",
    "attn_pool.proj.{x}": "head.pool.attention.out.{x}",
    "attn_pool.mlp.fc1.{x}": "head.pool.mlp.up.{x}", "attn_pool.mlp.fc2.{x}": "head.pool.mlp.down.{x}"}
STEM = {
    "patch_embed.proj.{x}": "patchify.{x}", "cls_token": "cls | batched", "reg_token": "registers | batched",
    "pos_embed": "positions.weight | batched"}
BLOCK = {
    "norm1.{x}": "mixer_norm.{x}", "norm2.{x}": "mlp_norm.{x}",
    "attn.q_norm.{x}": "mixer.q_norm.{x}", "attn.k_norm.{x}": "mixer.k_norm.{x}",
    "attn.norm.{x}": "mixer.inner_norm.{x}", "attn.proj.{x}": "mixer.out.{x}",
    "mlp.norm.{x}": "mlp.inner_norm.{x}", "mlp.fc2.{x}": "mlp.down.{x}"}
SCALES = {"ls1.gamma": "mixer_scale", "ls2.gamma": "mlp_scale"}
EVA_SCALES = {"gamma_1": "mixer_scale", "gamma_2": "mlp_scale"}


def table_of(spec: ViTSpec, names: Iterable[str], stem: Mapping[str, str], **changes: Any) -> Table:
    """The rows of `stem`, of every block and of the head. `names`, those on disk, show how LayerScale is called and
    what is fused or split; `changes` are further transforms."""
    names, layer = set(names), spec.stack.layers[0]
    scales = SCALES if any(".ls1." in name for name in names) else EVA_SCALES
    block = BLOCK | scales | qkv_rows(layer.mixer, any(".attn.q_proj." in name for name in names)) | up_rows(
        layer.mlp, any(".mlp.fc1_g." in name for name in names))
    rows = {f"blocks.{{n}}.{theirs}": f"stack.blocks.{{n}}.{ours}" for theirs, ours in block.items()}
    sizes = widths(layer.mixer)
    biases = fused(*(sizes[part] for part in biased(layer.mixer)))
    return Table(rules_of({**stem, **ROWS, **rows}, {**TRANSFORMS, "qkv": fused(*sizes.values()), "biases": biases}
                          | changes), {"mask_token": PRETRAINING_ONLY})


def widths(mixer: Attention) -> dict[str, int]:
    return {"q": mixer.heads * mixer.head_dim} | dict.fromkeys("kv", mixer.kv_heads * mixer.head_dim)


def biased(mixer: Attention) -> list[str]:
    return [part for part in "qkv" if getattr(mixer, f"{part}_bias")]


def qkv_rows(mixer: Attention, split: bool) -> dict[str, str]:
    """Three projections, or one; without a key bias the other two stand alone beside the one."""
    held = " ".join(biased(mixer))
    if not split and len(biased(mixer)) != 2:
        return {"attn.qkv.{x}": "mixer.qkv.{x}"}
    bias = {f"attn.[{held}]_{'proj.' if split else ''}bias": "mixer.qkv.bias | biases"} if held else {}
    return bias | ({"attn.[q k v]_proj.weight": "mixer.qkv.weight | qkv"} if split else {
        "attn.qkv.weight": "mixer.qkv.weight"})


def up_rows(mlp: Mlp, split: bool) -> dict[str, str]:
    if split:
        return {"mlp.fc1_g.{x}": "mlp.gate.{x}", "mlp.fc1_x.{x}": "mlp.up.{x}"}
    return {"mlp.fc1.{x}": "mlp.[gate up].{x} | halves" if mlp.gated else "mlp.up.{x}"}


# ------------------------------------------------------------------------------------- the family of a class
def timm_family(kind: Callable[[], type], to_spec: Callable[[nn.Module, str], Any],
                to_model: Callable[[Any], tuple[str, dict[str, Any]]],
                table: Callable[[Any, Iterable[str]], Table], **more: Any) -> Family:
    """The family of one of timm's classes: `kind()` is the class, `to_spec(module, where)` reads a spec off a module,
    `to_model(spec)` gives an architecture and the arguments that replace everything about it, None for timm's own."""
    def arguments(spec: Any) -> tuple[str, dict[str, Any]]:
        architecture, args = to_model(spec)
        return architecture, {name: value for name, value in args.items() if value is not None}

    def accepts(config: Mapping[str, Any]) -> bool:
        return "architecture" in config and "model_type" not in config and isinstance(
            blueprint(config, CONFIG), kind())

    def from_spec(spec: Any) -> dict[str, Any]:
        if not isinstance(spec, ViTSpec):
            raise InputError(f"the timm layout holds a ViT, not a {type(spec).__name__}")
        architecture, args = arguments(spec)
        model = blueprint(bare(architecture, args), f"the {architecture} of timm")
        ensure_kept(spec, to_spec(model, "the timm layout"), "timm")
        return config_of(model, architecture, args)

    def rules(spec: Any, names: Iterable[str]) -> Table:
        """Names in a file or, when one is to be written, those of timm's module."""
        return table(spec, tuple(names) or tuple(blueprint(bare(*arguments(spec)), "timm").state_dict()))

    return Family(**{"layout": "timm", "weights": FILES, "accepts": accepts, "from_spec": from_spec, "table": rules,
                     "to_spec": lambda config, where: to_spec(blueprint(config, where), where), "files": files,
                     "labels": labels} | more)


def config_of(model: nn.Module, architecture: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """What timm writes about such a model, but for the preprocessing."""
    own = copy.deepcopy({name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier")})
    size = args.get("img_size") or (224, 224)
    cfg = {"num_classes": model.num_classes, "input_size": [args.get("in_chans", 3), *size], "custom_load": False,
           "fixed_input_size": False, **{k: v for k, v in own.items() if v is not None}}
    return {"architecture": architecture, "num_classes": model.num_classes, "num_features": model.num_features,
            "global_pool": args.get("global_pool", ""), "model_args": dict(args), "pretrained_cfg": cfg}


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    cfg = dict(config["pretrained_cfg"])
    if extras.preprocess is not None:
        cfg |= extras.preprocess.to_timm()
    if extras.labels:
        cfg["label_names"] = list(extras.labels)
    return {CONFIG: config | {"pretrained_cfg": cfg}}


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A model without a classifier may still name the classes of the one that was taken off it: these do not count."""
    if config.get("num_classes") == 0:
        return ()
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names") or ()
    return tuple(str(name) for name in names)
