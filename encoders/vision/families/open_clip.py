"""OpenAI's and OpenCLIP's CLIP with a ViT: `open_clip_config.json`, image weights under `visual.`, those of the text
tower at the top level or under `text.`. Follows open_clip 3.3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mm.checkpoint.family import Extras, Keys
from mm.checkpoint.tables import SAME, SCALAR, TRANSPOSED, Rule, Table, WeightTransform, reshaped, rule
from mm.errors import InputError
from mm.spec import CAUSAL, EVERYWHERE, LayerNorm, Stack

from ...spec import (
    ArgmaxPool,
    CLIPSpec,
    EosPool,
    GridTable,
    Head,
    MeanPool,
    Patches,
    Pool,
    Projection,
    QueryPool,
    TextSpec,
    TokenPool,
    ViTSpec,
)
from .common import Family, encoder, ensure_kept
from .common import projected_vit as a_vit

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
         "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
TOP_HARMLESS = ("custom_text", "output_dict", "nonscalar_logit_scale", "cast_dtype")
VISION_HARMLESS = ("output_tokens",)
TEXT_HARMLESS = ("output_tokens", "final_ln_after_pool", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs",
                 "tokenizer_mode")
SCALARS = "a number that the config holds too"


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> CLIPSpec:
    """Raises InputError that names keys which are absent, wrong, or ask for an architecture that is not this one."""
    keys = Keys(config.get("model_cfg"), f"{where}: model_cfg")
    dim, quick = keys.positive("embed_dim"), keys.take("quick_gelu", bool, False)
    spec = CLIPSpec(
        image=vision_spec(Keys(keys.take("vision_cfg", dict), f"{where}: vision_cfg"), dim, quick),
        text=text_spec(Keys(keys.take("text_cfg", dict), f"{where}: text_cfg"), dim, quick),
        logit_scale=keys.take("init_logit_scale", (int, float), CLIPSpec.logit_scale),
        logit_bias=keys.take("init_logit_bias", (int, float), None))
    keys.done(TOP_HARMLESS)
    return spec


def vision_spec(keys: Keys, embed: int, quick: bool) -> ViTSpec:
    dim, head_width, size = keys.positive("width", 768), keys.positive("head_width", 64), keys.pair("patch_size", 16)
    if isinstance(keys.left.get("layers"), list):
        raise InputError(f"{keys.where}: layers={keys.left['layers']} is a ResNet, and only ViT towers are supported")
    norm, after = norm_of(keys), keys.take("final_ln_after_pool", bool, False)
    pool = vision_pool(keys, embed, norm)
    inside = isinstance(pool, QueryPool)
    tables = {"learnable": GridTable(), "sin_cos_2d": GridTable(fixed=True)}
    positions = choice(keys, "pos_embed_type", tables, "learnable")
    layers = stack_of(keys, dim, dim // head_width, norm, quick)
    spec = ViTSpec(
        image=keys.pair("image_size", 224), patches=Patches(size=size, bias=False), positions=positions,
        pre_norm=None if keys.take("no_ln_pre", bool, False) else norm,
        stack=encoder(**layers, final_norm=not after and not inside),
        head=Head(pool=pool, norm=norm if after and not inside else None, proj=Projection(dim=embed)),
        patch_dropout=float(keys.take("patch_dropout", (int, float), 0.0)))
    keys.done(VISION_HARMLESS)
    return spec


def vision_pool(keys: Keys, embed: int, norm: LayerNorm) -> Pool:
    then = choice(keys, "pool_type", {"tok": TokenPool(), "avg": MeanPool()}, "tok")
    queries, heads = keys.positive("attn_pooler_queries", 256), keys.positive("attn_pooler_heads", 8)
    if not keys.take("attentional_pool", bool, False):
        return then
    return QueryPool(queries=queries, heads=heads, dim=embed, then=then, norm=norm)


def text_spec(keys: Keys, embed: int, quick: bool) -> TextSpec:
    dim, heads, norm = keys.positive("width", 512), keys.positive("heads", 8), norm_of(keys)
    eos = keys.take("eos_id", int, 2)
    pools = {"argmax": ArgmaxPool(), "eos": EosPool(id=eos), "first": TokenPool(), "last": TokenPool(index=-1)}
    pool = choice(keys, "pool_type", pools, "argmax")
    bias = keys.take("proj_bias", bool, False)
    proj = choice(keys, "proj_type", {"linear": Projection(dim=embed, bias=bias), "none": None}, "linear")
    window = EVERYWHERE if keys.take("no_causal_mask", bool, False) else CAUSAL
    layers = stack_of(keys, dim, heads, norm, quick)
    spec = TextSpec(vocab=keys.positive("vocab_size", 49408), context=keys.positive("context_length", 77),
                    stack=encoder(**layers, window=window), head=Head(pool=pool, proj=proj))
    keys.done(TEXT_HARMLESS)
    return spec


def stack_of(keys: Keys, dim: int, heads: int, norm: LayerNorm, quick: bool) -> dict[str, Any]:
    """The arguments of `encoder` that both towers read alike."""
    if dim % max(heads, 1) or not heads:
        raise InputError(f"{keys.where}: width {dim} cannot be split over {heads} heads")
    choice(keys, "block_type", {"default": None}, "default")
    kwargs = Keys(keys.take("act_kwargs", dict, {}), f"{keys.where}.act_kwargs")
    acts = {"none": "quick_gelu" if quick else "gelu", "tanh": "gelu_tanh"}
    act = choice(kwargs, "approximate", acts, "none")
    kwargs.done()
    return {"dim": dim, "depth": keys.positive("layers", 12), "heads": heads, "norm": norm, "act": act,
            "hidden": int(dim * keys.take("mlp_ratio", (int, float), 4.0)),
            "layer_scale": keys.take("ls_init_value", (int, float), None)}


def norm_of(keys: Keys) -> LayerNorm:
    kwargs = Keys(keys.take("norm_kwargs", dict, {}), f"{keys.where}.norm_kwargs")
    norm = LayerNorm(eps=kwargs.take("eps", float, 1e-5))
    kwargs.done()
    return norm


def choice(keys: Keys, name: str, options: Mapping[str, Any], default: str) -> Any:
    value = keys.take(name, str, default)
    if value not in options:
        raise InputError(f"{keys.where}: {name} should be {' or '.join(options)}, not {value!r}")
    return options[value]


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: CLIPSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    image, text = a_vit(spec, "open_clip"), spec.text
    quick = image.stack.layers[0].mlp.act == "quick_gelu"
    model = {"embed_dim": (image.head.proj or Projection(dim=0)).dim, "quick_gelu": quick,
             "init_logit_scale": spec.logit_scale, "init_logit_bias": spec.logit_bias,
             "vision_cfg": vision_config(image), "text_cfg": text_config(text)}
    model = {name: value for name, value in model.items() if value is not None}
    ensure_kept(spec, to_spec({"model_cfg": model}, CONFIG), "open_clip")
    return {"model_cfg": model}


def vision_config(spec: ViTSpec) -> dict[str, Any]:
    pool, config = spec.head.pool, stack_config(spec.stack)
    config |= {"head_width": spec.stack.layers[0].mixer.head_dim, "image_size": one_or_two(spec.image),
               "patch_size": one_or_two(spec.patches.size), "patch_dropout": spec.patch_dropout}
    config.pop("heads")
    if isinstance(pool, QueryPool):
        config |= {"attentional_pool": True, "attn_pooler_queries": pool.queries, "attn_pooler_heads": pool.heads}
        pool = pool.then
    flags = {"no_ln_pre": spec.pre_norm is None, "final_ln_after_pool": spec.head.norm is not None}
    config |= {name: True for name, value in flags.items() if value}
    if isinstance(pool, MeanPool):
        config["pool_type"] = "avg"
    if isinstance(spec.positions, GridTable) and spec.positions.fixed:
        config["pos_embed_type"] = "sin_cos_2d"
    return config


def text_config(spec: TextSpec) -> dict[str, Any]:
    pool = spec.head.pool
    config = stack_config(spec.stack) | {"context_length": spec.context, "vocab_size": spec.vocab}
    if spec.stack.layers[0].mixer.window != CAUSAL:
        config["no_causal_mask"] = True
    match pool:
        case EosPool(id=eos):
            config |= {"pool_type": "eos", "eos_id": eos}
        case TokenPool(index=index):
            config["pool_type"] = "first" if index == 0 else "last"
    if spec.head.proj is None:
        config["proj_type"] = "none"
    elif spec.head.proj.bias:
        config["proj_bias"] = True
    return config


def stack_config(stack: Stack) -> dict[str, Any]:
    layer = stack.layers[0]
    hidden = layer.mlp.hidden
    ratio = hidden / stack.dim
    config = {"width": stack.dim, "layers": len(stack.layers), "heads": layer.mixer.heads,
              "mlp_ratio": ratio if int(stack.dim * ratio) == hidden else (hidden + 0.5) / stack.dim}
    if layer.layer_scale is not None:
        config["ls_init_value"] = layer.layer_scale
    if layer.norm.eps != 1e-5:
        config["norm_kwargs"] = {"eps": layer.norm.eps}
    if layer.mlp.act == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    return config


def one_or_two(pair: tuple[int, ...]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


# -------------------------------------------------------------------------------------------- weights
def table(spec: CLIPSpec, names: Iterable[str]) -> Table:
    """`names` decide whether the text tower lies under `text.`; what is written has it at the top level."""
    text = "text." if any(name.startswith("text.transformer.") for name in names) else ""
    width = spec.image.stack.dim
    pool, post = spec.image.head.pool, "image.head.norm" if spec.image.head.norm else "image.stack.final_norm"
    rules = [
        rule("visual.conv1.weight", "image.patchify.weight"),
        rule("visual.class_embedding", "image.cls", reshaped((1, width), (width,))),
        rule("visual.positional_embedding", "image.positions.weight"),
        rule("visual.ln_pre.{x}", "image.pre_norm.{x}"),
        rule("visual.ln_post.{x}", ("image.head.pool.norm" if isinstance(pool, QueryPool) else post) + ".{x}"),
        rule("visual.proj", "image.head.proj.weight", TRANSPOSED),
        *block_rules("visual.transformer.", "image.stack."),
        *(pooler_rules(pool, width) if isinstance(pool, QueryPool) else ()),
        *text_rules(spec.text, text)]
    return Table(tuple(rules), {name: SCALARS for name in ("input_resolution", "context_length", "vocab_size")})


def text_rules(spec: TextSpec, t: str) -> list[Rule]:
    """The text tower's under the prefix `t`, and the scalars of the pair."""
    proj = spec.head.proj
    return [
        rule(f"{t}token_embedding.weight", "text.tokens"), rule(f"{t}positional_embedding", "text.positions"),
        rule(f"{t}ln_final.{{x}}", ("text.head.norm" if spec.head.norm else "text.stack.final_norm") + ".{x}"),
        *block_rules(f"{t}transformer.", "text.stack."),
        rule(f"{t}text_projection.{{x}}", "text.head.proj.{x}") if proj and proj.bias else
        rule(f"{t}text_projection", "text.head.proj.weight", TRANSPOSED),
        rule("logit_scale", "logit_scale", SCALAR), rule("logit_bias", "logit_bias", SCALAR)]


def block_rules(theirs: str, ours: str) -> list[Rule]:
    t, o = f"{theirs}resblocks.{{n}}.", f"{ours}blocks.{{n}}."
    return [rule(t + "ln_1.{x}", o + "mixer_norm.{x}"), rule(t + "ln_2.{x}", o + "mlp_norm.{x}"),
            *(rule(f"{t}attn.in_proj_{x}", f"{o}mixer.qkv.{x}") for x in ("weight", "bias")),
            rule(t + "attn.out_proj.{x}", o + "mixer.out.{x}"),
            rule(t + "mlp.c_fc.{x}", o + "mlp.up.{x}"), rule(t + "mlp.c_proj.{x}", o + "mlp.down.{x}"),
            rule(t + "ls_1.gamma", o + "mixer_scale"), rule(t + "ls_2.gamma", o + "mlp_scale")]


def pooler_rules(pool: QueryPool, width: int) -> list[Rule]:
    t, o, d = "visual.attn_pool.", "image.head.pool.", pool.dim
    q_kv = WeightTransform(lambda xs: [xs[0][:d], xs[0][d:]], lambda xs: [torch.cat(list(xs))])
    k_v = WeightTransform(lambda xs: [torch.cat(list(xs))], lambda xs: list(xs[0].chunk(2)))
    weights = [rule(t + "attn.in_proj_weight", (o + "attention.q.weight", o + "attention.kv.weight"), q_kv)]
    if width != d:
        weights = [rule(t + "attn.q_proj_weight", o + "attention.q.weight", SAME),
                   rule((t + "attn.k_proj_weight", t + "attn.v_proj_weight"), o + "attention.kv.weight", k_v)]
    return [*weights, rule(t + "attn.in_proj_bias", (o + "attention.q.bias", o + "attention.kv.bias"), q_kv),
            rule(t + "query", o + "query"), rule(t + "attn.out_proj.{x}", o + "attention.out.{x}"),
            rule(t + "ln_q.{x}", o + "query_norm.{x}"), rule(t + "ln_k.{x}", o + "token_norm.{x}")]


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    """The tokenizer, unless it is CLIP's own, is found through the text config."""
    model = dict(config["model_cfg"])
    model["text_cfg"] = model["text_cfg"] | (extras.tokenizer.to_open_clip() if extras.tokenizer else {})
    return {CONFIG: {"model_cfg": model, "preprocess_cfg": extras.preprocess.to_open_clip()}}


def trunk_name(config: Mapping[str, Any]) -> str | None:
    """The name of the timm model that is the image tower, where one is."""
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    return vision.get("timm_model_name") if isinstance(vision, Mapping) else None


OPEN_CLIP = Family(
    layout="open_clip", config=CONFIG, weights=FILES, has_text=True,
    accepts=lambda config: "model_cfg" in config and not trunk_name(config),
    to_spec=to_spec, from_spec=from_spec, table=table, files=files)
