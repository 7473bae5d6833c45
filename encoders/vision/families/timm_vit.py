"""timm's VisionTransformer: ViT, CLIP's and SigLIP's towers, DeiT and DeiT III, DINOv2. A spec is read off a module
without memory, never off a name. Follows timm 1.0.31."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mm.checkpoint.tables import Table
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, QKNorm

from ...spec import GridTable, Head, Patches, PrefixPool, Projection, ViTSpec
from .common import TWO_HEADS, ratio
from .timm_common import (
    ACTS,
    POOLS,
    STEM,
    first_layer,
    head_of,
    mlp_of,
    norm_of,
    pool_args,
    size_args,
    spec_of,
    table_of,
    timm_family,
)


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
    return spec_of(
        model, lambda block: layer_of(block, where), where,
        image=tuple(patches.img_size), cls=model.num_prefix_tokens - model.num_reg_tokens,
        registers=model.num_reg_tokens, positions=None if table is None else GridTable(prefix=prefix),
        patches=Patches(size=tuple(patches.patch_size), channels=model.in_chans, bias=patches.proj.bias is not None),
        head=distilled_head(model) if hasattr(model, "head_dist") else head_of(model, where, POOLS))


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


def distilled_head(model: nn.Module) -> Head:
    """A class token and a distillation token, with a classifier each where there are classes."""
    two = Projection(dim=model.num_classes, bias=True) if isinstance(model.head_dist, nn.Linear) else None
    return Head(pool=TWO_HEADS if two else PrefixPool(tokens=2), proj=two)


# ------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    rows = dict(STEM)
    if spec.cls == 2:
        rows |= {"cls_token": "", "[cls_token dist_token]": "cls | two tokens"}
    if spec.head.pool == TWO_HEADS:
        rows |= {"[head head_dist].weight": "head.proj.weight | half each",
                 "[head head_dist].bias": "head.proj.bias | mean of both"}
    return table_of(spec, names, rows)


# ------------------------------------------------------------------------------------- spec to module
def to_model(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """An architecture, and the arguments that replace everything about it but its norm and its kind of MLP. Raises
    InputError for what timm's VisionTransformer has no arguments for."""
    layer = first_layer(spec, "VisionTransformer")
    if layer.mixer.rope:
        raise InputError("timm's VisionTransformer holds layers of attention without rope")
    return architecture(spec, layer), stem_args(spec) | layer_args(layer, spec.stack.dim) | head_args(spec)


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
    table = spec.positions
    args = {**size_args(spec), "reg_tokens": spec.registers, "pre_norm": spec.pre_norm is not None,
            "dynamic_img_size": True, "no_embed_class": table is not None and not table.prefix,
            "pos_embed": "learn" if table else "none"}
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


def head_args(spec: ViTSpec) -> dict[str, Any]:
    """The pool of the head; VisionTransformer takes the size of an attention pool from the trunk."""
    pool = spec.head.pool
    if isinstance(pool, PrefixPool):
        return {"global_pool": "token"}
    inside = getattr(pool, "prefix", False)
    known = {name: type(kept)(prefix=inside) if hasattr(kept, "prefix") else kept for name, kept in POOLS.items()}
    given = {"global_pool": pool_args(spec, "VisionTransformer", known)["global_pool"]}
    return given | ({"pool_include_prefix": True} if inside and spec.cls + spec.registers > 0 else {})


def kind() -> type:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


TIMM_VIT = timm_family(kind, to_spec, to_model, table)
