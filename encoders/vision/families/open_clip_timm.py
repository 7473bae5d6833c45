"""open_clip's CLIP with a timm model as its image tower: SigLIP, EVA-02-CLIP, Perception Encoder, ConvNeXt and others.
Weights lie under `visual.trunk.` and `visual.head.`, the text tower's under `text.` or at the top. A tower that is one
of ours is read as a ViT, any other one runs as timm's. Follows open_clip 3.3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from mm.checkpoint.family import Keys, difference
from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError

from ...spec import Argument, Backbone, CLIPSpec, MaxPool, MeanPool, Pool, ProbePool, Projection, TokenPool, ViTSpec
from .. import backbone
from . import timm_eva, timm_vit
from .common import Family, ensure_kept, essence
from .open_clip import (
    CONFIG,
    FILES,
    TOP_HARMLESS,
    VISION_HARMLESS,
    choice,
    files,
    one_or_two,
    text_config,
    text_rules,
    text_spec,
    trunk_name,
)

OVERRIDDEN = ("layers", "width", "head_width", "patch_size", "mlp_ratio")  # by the name of timm's model
KINDS = (timm_vit, timm_eva)
OURS = ("vision_transformer", "eva")  # timm's modules whose models can be ours
PROJECTIONS = {"linear": "linear", "mlp": "mlp", "none": "none", "": "own"}
EVA = {"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "blocks.0.gamma_1"}  # names that only timm's Eva has
POOLS = {TokenPool(): "token", MeanPool(): "avg", MaxPool(): "max"}


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> CLIPSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config.get("model_cfg"), f"{where}: model_cfg")
    dim, quick = keys.positive("embed_dim"), keys.take("quick_gelu", bool, False)
    spec = CLIPSpec(
        image=tower(trunk_settings(Keys(keys.take("vision_cfg", dict), f"{where}: vision_cfg"), dim), where),
        text=text_spec(Keys(keys.take("text_cfg", dict), f"{where}: text_cfg"), dim, quick),
        logit_scale=keys.take("init_logit_scale", (int, float), CLIPSpec.logit_scale),
        logit_bias=keys.take("init_logit_bias", (int, float), None))
    keys.done(TOP_HARMLESS)
    return spec


def trunk_settings(keys: Keys, embed: int) -> Backbone:
    """timm_model_pretrained says where training started, and quick_gelu nothing about timm's models."""
    keys.left["timm_proj"] = keys.left.get("timm_proj", "linear") or ""  # null is a value of its own here
    drop_path = keys.take("timm_drop_path", (int, float), None)
    pool = keys.take("timm_pool", str, "avg")
    if pool in ("abs_attn", "rot_attn"):
        raise InputError(f"{keys.where}: timm_pool {pool} is not supported")
    settings = Backbone(
        name=keys.take("timm_model_name", str), image=keys.pair("image_size", 224), dim=embed, pool=pool,
        head=choice(keys, "timm_proj", PROJECTIONS, "linear"), bias=keys.take("timm_proj_bias", bool, False),
        dropout=float(keys.take("timm_drop", (int, float), 0.0)),
        drop_path=None if drop_path is None else float(drop_path),
        patch_dropout=float(keys.take("patch_dropout", (int, float), 0.0)))
    keys.done((*VISION_HARMLESS, *OVERRIDDEN, "timm_model_pretrained"))
    return settings


def tower(settings: Backbone, where: str) -> ViTSpec | Backbone:
    """The trunk and head as a ViT of ours, where it is one."""
    trunk = backbone.outline(settings)
    kind = kind_of(trunk)
    if kind is None or settings.head == "mlp":
        return settings
    try:
        spec = kind.to_spec(trunk, where)
    except InputError:  # a block that ours is not
        return settings
    if spec.image != tuple(settings.image):
        raise InputError(f"{where}: image_size is {settings.image}, and timm's {settings.name} is made for "
                         f"{spec.image}")
    if settings.head != "linear":
        return spec
    return replace(spec, head=replace(spec.head, proj=Projection(dim=settings.dim, bias=settings.bias)))


def kind_of(trunk: nn.Module) -> Any:
    """The table of the timm class that this is."""
    return next((kind for kind in KINDS if type(trunk) is kind.kind()), None)


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: CLIPSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    text, settings = spec.text, spec.image if isinstance(spec.image, Backbone) else named(spec.image)
    if settings.arguments:
        raise InputError(f"the open_clip layout has no place for the arguments of timm's {settings.name}, such as "
                         f"{settings.arguments[0].name}")
    trunk = backbone.outline(settings)
    if settings.head in ("linear", "mlp") and backbone.width(trunk) != trunk.num_features:
        raise InputError(f"open_clip takes timm's {settings.name} to end {trunk.num_features} wide, and it is "
                         f"{backbone.width(trunk)} wide")
    model = {"embed_dim": settings.dim, "custom_text": True, "init_logit_scale": spec.logit_scale,
             "init_logit_bias": spec.logit_bias, "vision_cfg": vision_config(settings), "text_cfg": text_config(text)}
    model["quick_gelu"] = text.stack.layers[0].mlp.act == "quick_gelu"
    model = {name: value for name, value in model.items() if value is not None}
    ensure_kept(spec, to_spec({"model_cfg": model}, CONFIG), "open_clip")
    return {"model_cfg": model}


def vision_config(settings: Backbone) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    return {"timm_model_name": settings.name, "image_size": one_or_two(settings.image), "timm_pool": settings.pool,
            "timm_proj": names[settings.head], "timm_proj_bias": settings.bias, "timm_drop": settings.dropout,
            "timm_drop_path": settings.drop_path, "patch_dropout": settings.patch_dropout,
            "timm_model_pretrained": False}


@lru_cache(maxsize=8)
def named(spec: ViTSpec) -> Backbone:
    """The model of timm that is this tower: open_clip gives timm a name and nothing else. Raises InputError that says
    how the nearest one differs."""
    short = essence(replace(spec, stack=replace(spec.stack, layers=spec.stack.layers[:1])))
    nearest = (math.inf, f"none is {spec.stack.dim} wide, for pictures of {spec.image} pixels")
    for settings in candidates(spec):
        theirs = of_depth_one(settings)
        if theirs is None or theirs.stack.dim != spec.stack.dim:
            continue
        mine, other = short, essence(theirs)
        if mine == other:
            mine, other = essence(spec), essence(tower(settings, settings.name))
        if mine == other:
            return replace(settings, patch_dropout=spec.patch_dropout)
        nearest = min(nearest, (distance(mine, other), f"in {settings.name}, {difference(mine, other)}"))
    raise InputError(f"the open_clip layout holds models of timm by name, and no name gives this tower: {nearest[1]}")


def of_depth_one(settings: Backbone) -> ViTSpec | None:
    """A tower with its first layer alone, which is quickly made; None where it is none of ours."""
    try:
        spec = tower(replace(settings, arguments=(Argument(name="depth", value=1),)), settings.name)
    except InputError:
        return None
    return spec if isinstance(spec, ViTSpec) else None


def distance(ours: Any, theirs: Any) -> int:
    """In how many values two pieces of spec data differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return sum(distance(ours.get(name), theirs.get(name)) for name in {*ours, *theirs})
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return sum(map(distance, ours, theirs))
    return int(ours != theirs)


def candidates(spec: ViTSpec) -> Iterator[Backbone]:
    """Every model of timm for pictures of this size that could be a ViT, with heads that end like this one."""
    import timm

    pool, proj = pool_name(spec.head.pool), spec.head.proj
    dim = proj.dim if proj else spec.head.width(spec.stack.dim)
    heads = [("none", pool)] if proj is None else [("linear", "" if pool == "map" else pool)]
    heads = [("own", pool), *heads] if proj and proj.bias else heads
    for head, how in heads:
        for name in (name for module in OURS for name in timm.list_models(module=module)):
            cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
            if cfg is not None and tuple(cfg.input_size[1:]) == tuple(spec.image):
                yield Backbone(name=name, image=spec.image, dim=dim, pool=how, head=head,
                               bias=bool(proj and proj.bias and head == "linear"))


def pool_name(pool: Pool) -> str:
    if isinstance(pool, ProbePool):
        return "map"
    if pool not in POOLS:
        raise InputError(f"timm has no pool like {pool}")
    return POOLS[pool]


# -------------------------------------------------------------------------------------------- weights
def table(spec: CLIPSpec, names: Iterable[str]) -> Table:
    """`names` decide whether the text tower lies under `text.`, where it is written."""
    names = list(names)
    text = "text." if not names or any(name.startswith("text.") for name in names) else ""
    ignored = {}
    if isinstance(spec.image, Backbone):
        image = [rule(f"visual.{part}.{{name}}", f"image.{part}.{{name}}") for part in ("trunk", "head")]
    else:
        known = trunk_table(spec.image, [name.removeprefix("visual.trunk.") for name in names if ".trunk." in name])
        image = [rule("visual.head.proj.{x}", "image.head.proj.{x}")] if own_head(spec, names) else []
        image = [*(moved(entry) for entry in known.rules
                   if not (image and entry.ours == ("head.proj.{x}",))), *image]
        ignored = {f"visual.trunk.{name}": reason for name, reason in known.ignored.items()}
    return Table((*image, *text_rules(spec.text, text)), ignored)


def trunk_table(spec: ViTSpec, names: list[str]) -> Table:
    settings = named(spec) if not names else None
    if settings is not None:
        trunk = backbone.outline(settings)
        return kind_of(trunk).table(spec, tuple(trunk.state_dict()))
    eva = spec.coords is not None or EVA & set(names)
    return (timm_eva if eva else timm_vit).table(spec, names)


def own_head(spec: CLIPSpec, names: list[str]) -> bool:
    """Whether the projection is open_clip's own layer behind timm's model."""
    if names:
        return "visual.head.proj.weight" in names
    return spec.image.head.proj is not None and named(spec.image).head == "linear"


def moved(entry: Rule) -> Rule:
    return Rule(tuple(f"visual.trunk.{name}" for name in entry.theirs),
                tuple(f"image.{name}" for name in entry.ours), entry.transform)


OPEN_CLIP_TIMM = Family(
    layout="open_clip", config=CONFIG, weights=FILES, has_text=True,
    accepts=lambda config: bool(trunk_name(config)), to_spec=to_spec, from_spec=from_spec, table=table, files=files)
