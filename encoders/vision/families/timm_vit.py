"""timm's VisionTransformer: ViT, CLIP's and SigLIP's towers, DeiT and DeiT III, DINOv2. A spec is read off a module
without memory, never off a name. Follows timm 1.0.31."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, Mlp, QKNorm, Stack

from ...spec import (
    GridTable,
    Head,
    MaxPool,
    MeanMaxPool,
    MeanPool,
    Patches,
    Pool,
    PrefixPool,
    ProbePool,
    Projection,
    TokenPool,
    ViTSpec,
)
from .common import BATCHED, HALF_EACH, MEAN_OF_BOTH, TWO_HEADS, TWO_TOKENS
from .timm_common import timm_family
from .timm_eva import mlp_rules, norm_of, pool_rules, ratio

POOLS = {"token": TokenPool(), "avg": MeanPool(), "max": MaxPool(), "avgmax": MeanMaxPool()}
ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "relu": "relu"}


# ------------------------------------------------------------------------------------- module to spec
def to_spec(model: nn.Module, where: str) -> ViTSpec:
    """Raises InputError that names what timm's VisionTransformer can do and this package cannot."""
    from timm.layers import PatchEmbed

    patches, table = model.patch_embed, model.pos_embed
    if type(patches) is not PatchEmbed or not isinstance(patches.norm, nn.Identity):
        raise InputError(f"{where}: the patch embedding {type(patches).__name__} is not supported, or has a norm")
    if patches.dynamic_img_pad:
        raise InputError(f"{where}: dynamic_img_pad is not supported")
    prefix = table is not None and not model.no_embed_class
    return ViTSpec(
        image=tuple(patches.img_size), cls=model.num_prefix_tokens - model.num_reg_tokens,
        registers=model.num_reg_tokens, positions=None if table is None else GridTable(prefix=prefix),
        patches=Patches(size=tuple(patches.patch_size), channels=model.in_chans, bias=patches.proj.bias is not None),
        pre_norm=norm_of(model.norm_pre, where), patch_dropout=getattr(model.patch_drop, "prob", 0.0),
        stack=Stack(dim=model.embed_dim, layers=tuple(layer_of(block, where) for block in model.blocks),
                    final_norm=norm_of(model.norm, where)),
        head=head_of(model, where))


def layer_of(block: nn.Module, where: str) -> Layer:
    from timm.models.vision_transformer import Block

    if type(block) is not Block:
        raise InputError(f"{where}: the block {type(block).__name__} is not supported")
    attn, scale = block.attn, getattr(block.ls1, "gamma", None)
    narrow = attn.proj.in_features != attn.proj.out_features
    if narrow or not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise InputError(f"{where}: scale_attn_norm and attn_dim are not supported")
    norm, bias = norm_of(attn.q_norm, where), attn.qkv.bias is not None
    mixer = Attention(heads=attn.num_heads, kv_heads=attn.num_heads, head_dim=attn.head_dim, q_bias=bias, k_bias=bias,
                      v_bias=bias, out_bias=attn.proj.bias is not None, qk_norm=QKNorm(norm=norm) if norm else None,
                      dropout=attn.attn_drop.p)
    return Layer(mixer=mixer, mlp=mlp_of(block.mlp, where), norm=norm_of(block.norm1, where),
                 layer_scale=None if scale is None else float(getattr(block.ls1, "init_values", 1e-5)),
                 drop_path=getattr(block.drop_path1, "drop_prob", 0.0), dropout=attn.proj_drop.p)


def mlp_of(mlp: nn.Module, where: str) -> Mlp:
    from timm.layers import GluMlp

    gated = isinstance(mlp, GluMlp)
    if gated and mlp.gate_last:
        raise InputError(f"{where}: an MLP whose second half is the gate is not supported")
    return Mlp(hidden=mlp.fc2.in_features, act=act_of(mlp.act, where), gated=gated, up_bias=mlp.fc1.bias is not None,
               down_bias=mlp.fc2.bias is not None, inner_norm=norm_of(mlp.norm, where), dropout=mlp.drop1.p)


def act_of(act: nn.Module, where: str) -> str:
    named = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    name = type(act).__name__
    if name not in named:
        raise InputError(f"{where}: the activation {name} is not supported")
    return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else named[name]


def head_of(model: nn.Module, where: str) -> Head:
    classifier = getattr(model, "head_dist", None)
    if classifier is not None:
        two = Projection(dim=model.num_classes, bias=True) if isinstance(classifier, nn.Linear) else None
        return Head(pool=TWO_HEADS if two else PrefixPool(tokens=2), proj=two)
    proj = Projection(dim=model.head.out_features, bias=True) if isinstance(model.head, nn.Linear) else None
    return Head(pool=pool_of(model, where), norm=norm_of(model.fc_norm, where), proj=proj)


def pool_of(model: nn.Module, where: str) -> Pool:
    pool = model.attn_pool
    if pool is not None:
        return ProbePool(heads=pool.num_heads, mlp=mlp_of(pool.mlp, where), norm=norm_of(pool.norm, where),
                         prefix=model.pool_include_prefix or not model.num_prefix_tokens)
    if model.global_pool not in POOLS:
        raise InputError(f"{where}: global_pool should be map, {' or '.join(POOLS)}, not {model.global_pool!r}")
    if model.pool_include_prefix and model.global_pool != "token":
        return type(POOLS[model.global_pool])(prefix=True)
    return POOLS[model.global_pool]


# -------------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    two = spec.head.pool == TWO_HEADS
    heads = [rule(("head.weight", "head_dist.weight"), "head.proj.weight", HALF_EACH),
             rule(("head.bias", "head_dist.bias"), "head.proj.bias", MEAN_OF_BOTH)] if two else []
    first = rule(("cls_token", "dist_token"), "cls", TWO_TOKENS) if spec.cls == 2 else rule("cls_token", "cls", BATCHED)
    return Table((
        rule("patch_embed.proj.{x}", "patchify.{x}"), first, rule("reg_token", "registers", BATCHED),
        rule("pos_embed", "positions.weight", BATCHED),
        rule("norm_pre.{x}", "pre_norm.{x}"), rule("norm.{x}", "stack.final_norm.{x}"),
        rule("fc_norm.{x}", "head.norm.{x}"), *(heads or [rule("head.{x}", "head.proj.{x}")]),
        *block_rules(spec.stack.layers[0]), *pool_rules()), {"mask_token": "of pretraining only"})


def block_rules(layer: Layer) -> list[Rule]:
    t, o = "blocks.{n}.", "stack.blocks.{n}."
    return [
        rule(t + "norm1.{x}", o + "mixer_norm.{x}"), rule(t + "norm2.{x}", o + "mlp_norm.{x}"),
        rule(t + "attn.qkv.{x}", o + "mixer.qkv.{x}"), rule(t + "attn.proj.{x}", o + "mixer.out.{x}"),
        *(rule(f"{t}attn.{part}_norm.{{x}}", f"{o}mixer.{part}_norm.{{x}}") for part in "qk"),
        rule(t + "ls1.gamma", o + "mixer_scale"), rule(t + "ls2.gamma", o + "mlp_scale"), *mlp_rules(layer.mlp, False)]


# ------------------------------------------------------------------------------------- spec to module
def to_model(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """An architecture, and the arguments that replace everything about it but its norm and its kind of MLP. Raises
    InputError for what timm's VisionTransformer has no arguments for."""
    layer = next(iter(spec.stack.layers), None)
    if layer is None or layer.mlp is None or not isinstance(layer.mixer, Attention) or layer.mixer.rope:
        raise InputError("timm's VisionTransformer holds layers of attention without rope, and MLP")
    args = stem_args(spec) | layer_args(layer, spec.stack.dim) | pool_args(spec)
    return architecture(spec, layer), args


def architecture(spec: ViTSpec, layer: Layer) -> str:
    """timm takes the eps of norms, a gated MLP and a second classifier from the architecture alone."""
    if layer.norm == LayerNorm(eps=1e-5) and not layer.mlp.gated:
        return "vit_base_patch16_clip_224"
    if layer.norm != LayerNorm(eps=1e-6):
        raise InputError(f"timm's VisionTransformer has LayerNorm of eps 1e-5 or 1e-6, not {layer.norm}")
    if layer.mlp.gated:
        return "vit_giant_patch14_dinov2"
    return "deit_base_distilled_patch16_224" if spec.cls == 2 else "vit_base_patch16_224"


def stem_args(spec: ViTSpec) -> dict[str, Any]:
    table, proj = spec.positions, spec.head.proj
    args = {"img_size": list(spec.image), "patch_size": list(spec.patches.size), "in_chans": spec.patches.channels,
            "embed_dim": spec.stack.dim, "depth": len(spec.stack.layers), "num_classes": proj.dim if proj else 0,
            "reg_tokens": spec.registers, "pre_norm": spec.pre_norm is not None, "dynamic_img_size": True,
            "no_embed_class": table is not None and not table.prefix, "pos_embed": "learn" if table else "none"}
    return args if spec.cls == 2 else args | {
        "class_token": spec.cls == 1, "fc_norm": spec.head.norm is not None,
        "final_norm": spec.stack.final_norm is not None or spec.head.norm is not None}


def layer_args(layer: Layer, dim: int) -> dict[str, Any]:
    mixer, mlp = layer.mixer, layer.mlp
    if mlp.act not in ACTS:
        raise InputError(f"timm's VisionTransformer has no activation {mlp.act}")
    return {"num_heads": mixer.heads, "qkv_bias": mixer.q_bias, "qk_norm": mixer.qk_norm is not None,
            "mlp_ratio": ratio(mlp.hidden * (2 if mlp.gated else 1), dim), "act_layer": ACTS[mlp.act],
            "init_values": layer.layer_scale}


def pool_args(spec: ViTSpec) -> dict[str, Any]:
    pool = spec.head.pool
    if isinstance(pool, PrefixPool):
        return {"global_pool": "token"}
    names = {TokenPool: "token", MeanPool: "avg", MaxPool: "max", MeanMaxPool: "avgmax", ProbePool: "map"}
    if type(pool) not in names or pool == TokenPool(index=-1):
        raise InputError(f"timm's VisionTransformer has no pool like {pool}")
    inside = getattr(pool, "prefix", False) and spec.cls + spec.registers > 0
    return {"global_pool": names[type(pool)], **({"pool_include_prefix": True} if inside else {})}


def kind() -> type:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


TIMM_VIT = timm_family(kind, to_spec, to_model, table)
