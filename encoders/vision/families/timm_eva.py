"""timm's Eva: EVA and EVA-02, DINOv3, Perception Encoder and RoPE-ViT. A spec is read off a module without memory,
never off a name. Follows timm 1.0.31."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from mm.checkpoint.tables import Table
from mm.errors import InputError
from mm.spec import Attention, Axial, Layer, LayerNorm, Mixed, QKNorm, Rope

from ...spec import CentredGrid, GridTable, IndexGrid, Patches, ViTSpec
from . import timm_common
from .common import ratio
from .timm_common import (
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

POOLS = {name: timm_common.POOLS[name] for name in ("token", "avg", "max")}


# ------------------------------------------------------------------------------------- module to spec
def to_spec(model: nn.Module, where: str) -> ViTSpec:
    """Raises InputError that names what timm's Eva can do and this package cannot."""
    if model.patch_embed.dynamic_img_pad:
        raise InputError(f"{where}: dynamic_img_pad is not supported")
    if len({getattr(block.attn, "num_kv_heads", None) for block in model.blocks}) > 1:
        raise InputError(f"{where}: num_kv_heads that differ between blocks are not supported")
    rope, coords = rope_of(model.rope, where)
    patches = model.patch_embed
    return spec_of(
        model, lambda block: layer_of(block, rope, where), where,
        image=tuple(patches.img_size), cls=int(model.cls_token is not None), coords=coords,
        patches=Patches(size=tuple(patches.patch_size), channels=model.in_chans, bias=patches.proj.bias is not None),
        registers=0 if model.reg_token is None else model.reg_token.shape[1],
        positions=None if model.pos_embed is None else GridTable(prefix=not model.no_embed_class),
        head=head_of(model, where, POOLS))


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


# ------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    return table_of(spec, names, STEM | rope_rows(spec))


def rope_rows(spec: ViTSpec) -> dict[str, str]:
    """The learned frequencies of all layers are one of timm's weights."""
    layers = " ".join(map(str, range(len(spec.stack.layers))))
    return {"rope.freqs": f"stack.blocks.[{layers}].mixer.mixed | per layer"}


# ------------------------------------------------------------------------------------- spec to module
def to_model(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """An architecture, and the arguments that replace everything about it but its norm. Names on disk come out as in
    the published checkpoints: EVA-02 B and L split q, k and v, DINOv3 splits SwiGLU. Raises InputError for what timm's
    Eva has no arguments for."""
    layer = first_layer(spec, "Eva")
    args = {**stem_args(spec), **layer_args(layer, spec.stack.dim), **pool_args(spec, "Eva", POOLS), **rope_args(spec)}
    return architecture(layer), args | {"swiglu_align_to": int(isinstance(spec.coords, CentredGrid))}


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
    table = spec.positions
    return {**size_args(spec), "dynamic_img_size": True, "class_token": spec.cls > 0,
            "num_reg_tokens": spec.registers,
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


def kind() -> type:
    from timm.models.eva import Eva

    return Eva


TIMM_EVA = timm_family(kind, to_spec, to_model, table)
