"""timm's Eva: EVA and EVA-02, DINOv3, Perception Encoder and RoPE-ViT. A spec is read off a module without memory,
never off a name. Follows timm 1.0.31."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mm.checkpoint.tables import GATE_UP as HALVES
from mm.checkpoint.tables import Rule, Table, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import Attention, Axial, Layer, LayerNorm, Mixed, Mlp, Norm, QKNorm, RMSNorm, Rope, Stack

from ...spec import (
    CentredGrid,
    GridTable,
    Head,
    IndexGrid,
    MaxPool,
    MeanPool,
    Patches,
    Pool,
    ProbePool,
    Projection,
    TokenPool,
    ViTSpec,
)
from .common import BATCHED
from .timm_common import timm_family

PER_LAYER = WeightTransform(lambda xs: list(xs[0].unbind(1)), lambda xs: [torch.stack(list(xs), 1)])
POOLS = {"token": TokenPool(), "avg": MeanPool(), "max": MaxPool()}


# ------------------------------------------------------------------------------------- module to spec
def to_spec(model: nn.Module, where: str) -> ViTSpec:
    """Dropout of positions and before the head is left out: only timm's own training has it. Raises InputError that
    names what timm's Eva can do and this package cannot."""
    if model.patch_embed.dynamic_img_pad:
        raise InputError(f"{where}: dynamic_img_pad is not supported")
    if len({getattr(block.attn, "num_kv_heads", None) for block in model.blocks}) > 1:
        raise InputError(f"{where}: num_kv_heads that differ between blocks are not supported")
    rope, coords = rope_of(model.rope, where)
    patches = model.patch_embed
    return ViTSpec(
        image=tuple(patches.img_size), cls=int(model.cls_token is not None), coords=coords,
        patches=Patches(size=tuple(patches.patch_size), channels=model.in_chans, bias=patches.proj.bias is not None),
        registers=0 if model.reg_token is None else model.reg_token.shape[1],
        positions=None if model.pos_embed is None else GridTable(prefix=not model.no_embed_class),
        pre_norm=norm_of(model.norm_pre, where), patch_dropout=model.patch_drop.prob if model.patch_drop else 0.0,
        stack=Stack(dim=model.embed_dim, layers=tuple(layer_of(block, rope, where) for block in model.blocks),
                    final_norm=norm_of(model.norm, where)),
        head=head_of(model, where))


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


def layer_of(block: nn.Module, rope: Rope | None, where: str) -> Layer:
    from timm.models.eva import EvaBlock

    pre = isinstance(block, EvaBlock)
    scales = [scale is not None for scale in (block.gamma_1, block.gamma_2)] if pre else [False]
    if any(scales) != all(scales):
        raise InputError(f"{where}: attn_only_layer_scale is not supported")
    return Layer(
        mixer=mixer_of(block.attn, rope, where), mlp=mlp_of(block.mlp, where), norm=norm_of(block.norm1, where),
        placement="pre" if pre else "post_branch", layer_scale=block.init_values if any(scales) else None,
        drop_path=getattr(block.drop_path1, "drop_prob", 0.0), dropout=block.attn.proj_drop.p)


def mixer_of(attn: nn.Module, rope: Rope | None, where: str) -> Attention:
    """EvaAttention has no key bias; AttentionRope has all three biases or none."""
    if attn.gate is not None:
        raise InputError(f"{where}: gated_attn is not supported")
    names = {name for name, _ in attn.named_parameters()}
    q, k, v = (bool(names & {"qkv.bias", f"{part}_bias", f"{part}_proj.bias"}) for part in "qkv")
    norm = norm_of(attn.q_norm, where)
    return Attention(
        heads=attn.num_heads, kv_heads=getattr(attn, "num_kv_heads", attn.num_heads), head_dim=attn.head_dim, rope=rope,
        q_bias=q, k_bias=k, v_bias=v, out_bias=attn.proj.bias is not None, qk_norm=QKNorm(norm=norm) if norm else None,
        inner_norm=norm_of(attn.norm, where), dropout=attn.attn_drop.p)


def mlp_of(mlp: nn.Module, where: str) -> Mlp:
    from timm.layers import GluMlp, SwiGLU

    gated = isinstance(mlp, GluMlp | SwiGLU)
    acts = {"SiLU": "silu"} if gated else {"GELU": "gelu", "GELUTanh": "gelu_tanh"}
    act = type(mlp.act).__name__
    if act not in acts:
        raise InputError(f"{where}: the activation {act} is not supported")
    return Mlp(hidden=mlp.fc2.in_features, act=acts[act], gated=gated, inner_norm=norm_of(mlp.norm, where),
               dropout=mlp.drop1.p)


def head_of(model: nn.Module, where: str) -> Head:
    proj = Projection(dim=model.head.out_features, bias=True) if isinstance(model.head, nn.Linear) else None
    return Head(pool=pool_of(model, where), norm=norm_of(model.fc_norm, where), proj=proj)


def pool_of(model: nn.Module, where: str) -> Pool:
    pool = model.attn_pool
    if pool is not None:
        return ProbePool(heads=pool.num_heads, mlp=mlp_of(pool.mlp, where), norm=norm_of(pool.norm, where))
    if model.global_pool not in POOLS:
        raise InputError(f"{where}: global_pool should be {', '.join(POOLS)} or map, not {model.global_pool!r}")
    return POOLS[model.global_pool]


# ---------------------------------------------------------------------------------------------- rope
def rope_of(rope: nn.Module | None, where: str) -> tuple[Rope | None, IndexGrid | CentredGrid | None]:
    from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed

    match rope:
        case None:
            return None, None
        case RotaryEmbeddingCat(in_pixels=False, grid_type="index", aug_active=False):
            reference = rope.ref_feat_shape and tuple(rope.ref_feat_shape)
            grid = IndexGrid(order=ORDERS[rope.grid_indexing], reference=reference, offset=float(rope.grid_offset))
            return Rope(theta=float(rope.temperature), layout=layout_of(rope), axes=Axial()), grid
        case RotaryEmbeddingMixed(aug_active=False):
            return (Rope(theta=float(rope.temperature), layout="interleaved", axes=Mixed()),
                    IndexGrid(order=ORDERS[rope.grid_indexing]))
        case RotaryEmbeddingDinoV3(grid_indexing="ij", grid_offset=0, min_period=None, max_period=None):
            grid = CentredGrid(normalise=rope.normalize_coords, shift=rope.shift_coords or 0.0,
                               stretch=rope.jitter_coords or 1.0, rescale=rope.rescale_coords or 1.0)
            return (Rope(theta=rope.temperature, frequency=2 * math.pi, layout=layout_of(rope), axes=Axial()), grid)
    told = ", ".join(f"{name}={value}" for name, value in vars(rope).items() if name in ROPE_SETTINGS)
    raise InputError(f"{where}: the rope {type(rope).__name__}({told}) is not supported")


ROPE_SETTINGS = ("grid_indexing", "grid_offset", "grid_type", "shift_coords", "jitter_coords", "rescale_coords",
                 "min_period", "max_period", "mrope_section")
ORDERS = {"ij": "yx", "xy": "xy"}
INDEXING = {order: indexing for indexing, order in ORDERS.items()}


def layout_of(rope: nn.Module) -> str:
    return "half" if rope.rotate_half else "interleaved"


# -------------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    """`names`, those on disk, say which projections are fused and which are split."""
    names = set(names)
    mixed = tuple(f"stack.blocks.{n}.mixer.mixed" for n in range(len(spec.stack.layers)))
    return Table((
        rule("patch_embed.proj.{x}", "patchify.{x}"),
        rule("cls_token", "cls", BATCHED), rule("reg_token", "registers", BATCHED),
        rule("pos_embed", "positions.weight", BATCHED),
        rule("norm_pre.{x}", "pre_norm.{x}"), rule("norm.{x}", "stack.final_norm.{x}"),
        rule("fc_norm.{x}", "head.norm.{x}"), rule("head.{x}", "head.proj.{x}"),
        rule("rope.freqs", mixed, PER_LAYER), *block_rules(spec, names), *pool_rules()),
        {"mask_token": "of pretraining only"})


def block_rules(spec: ViTSpec, names: set[str]) -> list[Rule]:
    t, o, layer = "blocks.{n}.", "stack.blocks.{n}.", spec.stack.layers[0]
    return [
        rule(t + "norm1.{x}", o + "mixer_norm.{x}"), rule(t + "norm2.{x}", o + "mlp_norm.{x}"),
        *qkv_rules(layer.mixer, any(".attn.q_proj." in name for name in names)),
        *(rule(f"{t}attn.{part}_norm.{{x}}", f"{o}mixer.{part}_norm.{{x}}") for part in "qk"),
        rule(t + "attn.norm.{x}", o + "mixer.inner_norm.{x}"), rule(t + "attn.proj.{x}", o + "mixer.out.{x}"),
        rule(t + "gamma_1", o + "mixer_scale"), rule(t + "gamma_2", o + "mlp_scale"),
        *mlp_rules(layer.mlp, any(".mlp.fc1_g." in name for name in names))]


def qkv_rules(mixer: Attention, split: bool) -> list[Rule]:
    """Three projections, or one; without a key bias the other two stand alone beside the one."""
    t, o = "blocks.{n}.attn.", "stack.blocks.{n}.mixer.qkv."
    sizes = {"q": mixer.heads * mixer.head_dim} | dict.fromkeys("kv", mixer.kv_heads * mixer.head_dim)
    biases = [part for part in "qkv" if getattr(mixer, f"{part}_bias")]
    if not split and len(biases) != 2:
        return [rule(t + "qkv.{x}", o + "{x}")]
    form = "{}_proj.bias" if split else "{}_bias"
    bias = rule(tuple(t + form.format(part) for part in biases), o + "bias", fused(*map(sizes.get, biases)))
    weight = rule(tuple(f"{t}{part}_proj.weight" for part in sizes), o + "weight", fused(*sizes.values()))
    return [weight if split else rule(t + "qkv.weight", o + "weight"), *([bias] if biases else [])]


def mlp_rules(mlp: Mlp, split: bool) -> list[Rule]:
    t, o = "blocks.{n}.mlp.", "stack.blocks.{n}.mlp."
    up = [rule(t + "fc1.{x}", o + "up.{x}")]
    if split:
        up = [rule(t + "fc1_g.{x}", o + "gate.{x}"), rule(t + "fc1_x.{x}", o + "up.{x}")]
    elif mlp.gated:
        up = [rule(t + "fc1.{x}", (o + "gate.{x}", o + "up.{x}"), HALVES)]
    return [*up, rule(t + "norm.{x}", o + "inner_norm.{x}"), rule(t + "fc2.{x}", o + "down.{x}")]


def pool_rules() -> list[Rule]:
    t, o = "attn_pool.", "head.pool."
    return [rule(t + "latent", o + "probe", BATCHED),
            rule(t + "q.{x}", o + "attention.q.{x}"), rule(t + "kv.{x}", o + "attention.kv.{x}"),
            rule(t + "proj.{x}", o + "attention.out.{x}"), rule(t + "norm.{x}", o + "norm.{x}"),
            rule(t + "mlp.fc1.{x}", o + "mlp.up.{x}"), rule(t + "mlp.fc2.{x}", o + "mlp.down.{x}")]


# ------------------------------------------------------------------------------------- spec to module
def to_model(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """An architecture, and the arguments that replace everything about it but its norm. Names on disk come out as in
    the published checkpoints: EVA-02 B and L split q, k and v, DINOv3 splits SwiGLU. Raises InputError for what timm's
    Eva has no arguments for."""
    layer = next(iter(spec.stack.layers), None)
    if layer is None or layer.mlp is None or not isinstance(layer.mixer, Attention):
        raise InputError("timm's Eva holds layers of attention and MLP")
    args = {**stem_args(spec), **layer_args(layer, spec.stack.dim), **pool_args(spec), **rope_args(spec)}
    args["swiglu_align_to"] = int(isinstance(spec.coords, CentredGrid))
    return architecture(layer), {name: value for name, value in args.items() if value is not None}


def architecture(layer: Layer) -> str:
    """timm takes norms from the architecture alone, and no argument switches LayerScale off."""
    match layer.norm, layer.layer_scale:
        case LayerNorm(eps=1e-6), _:
            return "eva_giant_patch14_224"
        case LayerNorm(eps=1e-5), None:
            return "vit_pe_core_base_patch16_224"
        case LayerNorm(eps=1e-5), _:
            return "vit_base_patch16_dinov3"
    raise InputError(f"timm's Eva has LayerNorm of eps 1e-5 or 1e-6, not {layer.norm}")


def stem_args(spec: ViTSpec) -> dict[str, Any]:
    table, proj = spec.positions, spec.head.proj
    return {"img_size": list(spec.image), "patch_size": list(spec.patches.size), "in_chans": spec.patches.channels,
            "embed_dim": spec.stack.dim, "depth": len(spec.stack.layers), "dynamic_img_size": True,
            "class_token": spec.cls > 0, "num_reg_tokens": spec.registers, "num_classes": proj.dim if proj else 0,
            "use_abs_pos_emb": table is not None, "no_embed_class": table is not None and not table.prefix,
            "use_pre_transformer_norm": spec.pre_norm is not None, "use_fc_norm": spec.head.norm is not None,
            "use_post_transformer_norm": spec.stack.final_norm is not None}


def layer_args(layer: Layer, dim: int) -> dict[str, Any]:
    mixer, mlp = layer.mixer, layer.mlp
    grouped = mixer.kv_heads != mixer.heads
    return {"num_heads": mixer.heads, "num_kv_heads": mixer.kv_heads if grouped else None, "qkv_bias": mixer.q_bias,
            "attn_type": "rope" if mixer.k_bias or grouped else "eva",
            "qkv_fused": not grouped and mlp.inner_norm is None, "qk_norm": mixer.qk_norm is not None,
            "scale_attn_inner": mixer.inner_norm is not None, "scale_mlp": mlp.inner_norm is not None,
            "swiglu_mlp": mlp.gated, "mlp_ratio": ratio(mlp.hidden, dim), "init_values": layer.layer_scale,
            "use_post_norm": layer.placement == "post_branch"}


def pool_args(spec: ViTSpec) -> dict[str, Any]:
    pool = spec.head.pool
    if isinstance(pool, ProbePool):
        return {"global_pool": "map", "attn_pool_num_heads": pool.heads,
                "attn_pool_mlp_ratio": ratio(pool.mlp.hidden, spec.stack.dim)}
    named = next((name for name, known in POOLS.items() if known == pool), None)
    if named is None:
        raise InputError(f"timm's Eva has no pool like {pool}")
    return {"global_pool": named}


def rope_args(spec: ViTSpec) -> dict[str, Any]:
    rope, grid = spec.stack.layers[0].mixer.rope, spec.coords
    if rope is None:
        return {"use_rot_pos_emb": False}
    args = {"use_rot_pos_emb": True, "rope_temperature": rope.theta, "rope_rotate_half": rope.layout == "half"}
    if isinstance(grid, CentredGrid):
        moves = {"shift": grid.shift, "jitter": grid.stretch, "rescale": grid.rescale}
        moved = (grid.shift, grid.stretch, grid.rescale) != (0, 1, 1)
        return args | {"rope_type": "dinov3", "rope_grid_indexing": "ij", "rope_grid_offset": 0.0,
                       **{f"rope_{name}_coords": value for name, value in moves.items() if moved}}
    return args | {"rope_type": "mixed" if isinstance(rope.axes, Mixed) else "cat", "rope_grid_offset": grid.offset,
                   "rope_grid_indexing": INDEXING[grid.order],
                   "ref_feat_shape": grid.reference and list(grid.reference)}


def ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio that timm's int(dim * ratio) turns into `hidden`."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def kind() -> type:
    from timm.models.eva import Eva

    return Eva


TIMM_EVA = timm_family(kind, to_spec, to_model, table)
