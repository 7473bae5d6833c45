"""timm's NaFlexVit, for pictures at their own aspect and size. A spec is read off a module without memory, never off a
name. Follows timm 1.0.31."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mm.checkpoint.family import Extras
from mm.checkpoint.files import CONFIG, Folder
from mm.checkpoint.tables import Table, reshaped
from mm.errors import InputError
from mm.spec import Layer, LayerNorm, RMSNorm, Rope

from ...spec import CentredGrid, FactorTable, GridTable, Patches, ProbePool, ViTSpec
from .. import preprocess_files
from ..flex import FlexPreprocess
from . import timm_common, timm_eva, timm_vit
from .common import flattened
from .timm_common import (
    ACTS,
    POOLS,
    first_layer,
    head_of,
    pool_args,
    size_args,
    spec_of,
    table_of,
    timm_family,
)

ARCHITECTURE = "naflexvit_base_patch16_siglip"  # without LayerScale, which no argument switches off


# ------------------------------------------------------------------------------------- module to spec
def to_spec(model: nn.Module, where: str) -> ViTSpec:
    """Raises InputError that names what timm's NaFlexVit can do and this package cannot."""
    refuse(model, where)
    embeds = model.embeds
    rope, coords = timm_eva.rope_of(model.rope, where)
    return spec_of(
        model, lambda block: layer_of(block, rope, where), where, coords=coords, native=True,
        image=image_of(model, where), cls=int(embeds.cls_token is not None), registers=embeds.num_reg_tokens,
        patches=Patches(size=tuple(embeds.patch_size), channels=embeds.in_chans, bias=embeds.proj.bias is not None),
        positions=positions_of(embeds, where), head=head_of(model, where, POOLS))


def refuse(model: nn.Module, where: str) -> None:
    embeds = model.embeds
    odd = {"embed_proj_type other than linear": not embeds.is_linear,
           "embed_norm_layer": not isinstance(embeds.norm, nn.Identity),
           "patchify_channels_last=False": not embeds.channels_last,
           "dynamic_img_pad": embeds.dynamic_img_pad,
           "enable_patch_interpolator": embeds.enable_patch_interpolator,
           "pos_embed_use_grid_sample": embeds.pos_embed_use_grid_sample,
           "a patch_size that is not square": len(set(embeds.patch_size)) > 1,
           "num_kv_heads that differ between blocks":
               len({getattr(block.attn, "num_kv_heads", None) for block in model.blocks}) > 1}
    named = next((name for name, here in odd.items() if here), None)
    if named:
        raise InputError(f"{where}: {named} is not supported")


def image_of(model: nn.Module, where: str) -> tuple[int, int]:
    """The pixels that the position table was made for, or the picture size that the config gives."""
    grid, patch = model.embeds.pos_embed_grid_size, model.embeds.patch_size
    if grid is not None:
        return grid[0] * patch[0], grid[1] * patch[1]
    size = model.pretrained_cfg.get("input_size")
    if not size:
        raise InputError(f"{where} gives neither pos_embed_grid_size nor input_size")
    return tuple(size[1:])


def positions_of(embeds: nn.Module, where: str) -> GridTable | FactorTable | None:
    if embeds.pos_embed_type == "none":
        return None
    if embeds.pos_embed_type == "factorized":
        return FactorTable(keep_aspect=embeds.pos_embed_ar_preserving)
    if embeds.pos_embed_interp_mode not in ("bicubic", "bilinear"):
        raise InputError(f"{where}: pos_embed_interp_mode should be bicubic or bilinear, "
                         f"not {embeds.pos_embed_interp_mode!r}")
    return GridTable(prefix=False, mode=embeds.pos_embed_interp_mode, antialias=embeds.pos_embed_antialias,
                     keep_aspect=embeds.pos_embed_ar_preserving, align_corners=embeds.pos_embed_align_corners)


def layer_of(block: nn.Module, rope: Rope | None, where: str) -> Layer:
    """It has EVA's blocks where one of EVA's abilities is asked for, and plain ones otherwise."""
    from timm.models.eva import EvaBlock

    return timm_eva.layer_of(block, rope, where) if isinstance(block, EvaBlock) else timm_vit.layer_of(block, where)


# -------------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    """Blocks are those of timm's Eva or VisionTransformer."""
    rows, columns = spec.patches.grid(*spec.image)
    width = spec.stack.dim
    return table_of(spec, names, ROWS | timm_eva.rope_rows(spec), flattened=flattened(spec.patches),
                    grid=reshaped((rows * columns, width), (1, rows, columns, width)))


ROWS = {
    "embeds.proj.weight": "patchify.weight | flattened", "embeds.proj.bias": "patchify.bias",
    "embeds.cls_token": "cls | batched", "embeds.reg_token": "registers | batched",
    "embeds.pos_embed": "positions.weight | grid",
    "embeds.pos_embed_y": "positions.rows | batched", "embeds.pos_embed_x": "positions.columns | batched"}


# ------------------------------------------------------------------------------------- spec to module
def to_model(spec: ViTSpec) -> tuple[str, dict[str, Any]]:
    """An architecture, and the arguments that replace everything about it. Raises InputError for what timm's NaFlexVit
    has no arguments for."""
    layer = first_layer(spec, "NaFlexVit")
    return ARCHITECTURE, {
        **stem_args(spec), **position_args(spec.positions), **rope_args(spec), **head_args(spec),
        **layer_args(layer, spec.stack.dim), "swiglu_align_to": int(isinstance(spec.coords, CentredGrid))}


def stem_args(spec: ViTSpec) -> dict[str, Any]:
    after = spec.head.norm is not None
    return {**size_args(spec), "class_token": spec.cls > 0, "reg_tokens": spec.registers,
            "pre_norm": spec.pre_norm is not None,
            "final_norm": after or spec.stack.final_norm is not None, "fc_norm": after,
            "pos_embed_grid_size": list(spec.patches.grid(*spec.image))}


def position_args(positions: GridTable | FactorTable | None) -> dict[str, Any]:
    match positions:
        case GridTable():
            return {"pos_embed": "learned", "pos_embed_interp_mode": positions.mode,
                    "pos_embed_antialias": positions.antialias, "pos_embed_ar_preserving": positions.keep_aspect,
                    "pos_embed_align_corners": positions.align_corners}
        case FactorTable():
            return {"pos_embed": "factorized", "pos_embed_ar_preserving": positions.keep_aspect}
    return {"pos_embed": "none"}


def rope_args(spec: ViTSpec) -> dict[str, Any]:
    """Eva's arguments by NaFlexVit's names."""
    args = timm_eva.rope_args(spec)
    if not args.pop("use_rot_pos_emb"):
        return {"rope_type": "none"}
    if args["rope_type"] == "cat":
        args["rope_type"] = "axial"
    if "ref_feat_shape" in args:
        args["rope_ref_feat_shape"] = args.pop("ref_feat_shape")
    return args


def layer_args(layer: Layer, dim: int) -> dict[str, Any]:
    mixer, mlp = layer.mixer, layer.mlp
    norms = {LayerNorm(eps=1e-6): "layernorm", RMSNorm(eps=1e-6): "rmsnorm"}
    if layer.norm not in norms or (not mlp.gated and mlp.act not in ACTS):
        raise InputError(f"timm's NaFlexVit has norms of eps 1e-6 and no activation {mlp.act} beside {layer.norm}")
    args = timm_eva.layer_args(layer, dim)
    args.pop("use_post_norm")
    eva = (mixer.rope or mlp.gated or mixer.inner_norm or mlp.inner_norm or args["num_kv_heads"]
           or mixer.k_bias != mixer.q_bias)
    args["attn_type"] = args["attn_type"] if eva else "standard"
    inner = {f"{name}_norm": args.pop(name) for name in ("scale_attn_inner", "scale_mlp")}
    return args | inner | {"norm_layer": norms[layer.norm], "proj_bias": mixer.out_bias,
                           "act_layer": "gelu" if mlp.gated else ACTS[mlp.act]}


def head_args(spec: ViTSpec) -> dict[str, Any]:
    args = timm_vit.head_args(spec)
    return args | (pool_args(spec, "NaFlexVit", POOLS) if isinstance(spec.head.pool, ProbePool) else {})


# -------------------------------------------------------------------------------------- preprocessing
def preprocess(folder: Folder, spec: ViTSpec) -> FlexPreprocess:
    """As timm's own: as many patches as the picture size of the config has, at most."""
    path, patch = folder / CONFIG, spec.patches.size[0]
    try:
        given = preprocess_files.from_timm(folder.json(CONFIG))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    height, width = given.get("size", spec.image)
    kept = {name: given[name] for name in ("interpolation", "mean", "std") if name in given}
    return FlexPreprocess(patch=patch, tokens=max(1, (height // patch) * (width // patch)), **kept)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    if extras.preprocess is not None and not isinstance(extras.preprocess, FlexPreprocess):
        raise InputError("timm's NaFlexVit takes pictures at their own aspect: its preprocessing should be a "
                         f"FlexPreprocess, not a {type(extras.preprocess).__name__}")
    return timm_common.files(config, extras)


def kind() -> type:
    from timm.models.naflexvit import NaFlexVit

    return NaFlexVit


TIMM_NAFLEX = timm_family(kind, to_spec, to_model, table, preprocess=preprocess, files=files)
