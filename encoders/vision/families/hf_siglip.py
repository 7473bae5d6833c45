"""transformers' SigLIP, and SigLIP 2 at native aspect (NaFlex): model types `siglip` and `siglip2`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mm.checkpoint.tables import Rule, Table, WeightTransform, rule
from mm.errors import InputError
from mm.spec import EVERYWHERE, LayerNorm, Mlp

from ...spec import CLIPSpec, GridTable, Head, Patches, ProbePool, Projection, TextSpec, TokenPool, ViTSpec
from ..flex import HF_NAMES, FlexPreprocess
from ..image import Preprocess
from .common import Extras, Family, Keys, encoder, ensure_kept, pictures
from .hf_clip import ACTS, HARMLESS, POSITION_IDS, block_rules
from .hf_common import TO_HF
from .transforms import ONE, flattened

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
FIXED, FLEX = "siglip", "siglip2"
SHARED = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
VISION = SHARED | {"num_channels": 3, "patch_size": 16, "vision_use_head": True}
TEXT = SHARED | {"vocab_size": 32000, "max_position_embeddings": 64}
NATIVE = GridTable(prefix=False, mode="bilinear", antialias=True)
SQUARE = GridTable(prefix=False, antialias=False)


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> CLIPSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys, flex = Keys(config, where), config["model_type"] == FLEX
    vision, text = (Keys({**defaults, **keys.take(f"{name}_config", dict, {})}, f"{where}: {name}_config")
                    for name, defaults in (("vision", VISION), ("text", TEXT)))
    spec = CLIPSpec(image=vision_spec(vision, flex), text=text_spec(text), logit_scale=math.log(10), logit_bias=-10.0)
    keys.done(HARMLESS)
    return spec


def vision_spec(keys: Keys, flex: bool) -> ViTSpec:
    patch = keys.positive("patch_size")
    image = native_side(keys.positive("num_patches", 256), keys) * patch if flex else keys.positive("image_size", 224)
    stack = stack_of(keys)
    if not keys.take("vision_use_head", bool):
        raise InputError(f"{keys.where}: a tower without its head (vision_use_head false) is not supported")
    mlp = Mlp(hidden=stack["hidden"], act=stack["act"])
    spec = ViTSpec(
        image=(image, image), patches=Patches(size=(patch, patch), channels=keys.positive("num_channels")), cls=0,
        positions=NATIVE if flex else SQUARE, native=flex, stack=encoder(**stack),
        head=Head(pool=ProbePool(heads=stack["heads"], mlp=mlp, norm=stack["norm"])))
    keys.done(HARMLESS)
    return spec


def native_side(patches: int, keys: Keys) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise InputError(f"{keys.where}: num_patches should be a square number, not {patches}")
    return side


def text_spec(keys: Keys) -> TextSpec:
    """It sees both ways, padding included, and is read at its last place: texts must be padded to the context."""
    stack = stack_of(keys)
    proj = Projection(dim=keys.positive("projection_size", stack["dim"]), bias=True)
    spec = TextSpec(vocab=keys.positive("vocab_size"), context=keys.positive("max_position_embeddings"),
                    stack=encoder(**stack, window=EVERYWHERE), head=Head(pool=TokenPool(index=-1), proj=proj))
    keys.done(HARMLESS | {"eos_token_id"})
    return spec


def stack_of(keys: Keys) -> dict[str, Any]:
    dim, heads, act = keys.positive("hidden_size"), keys.positive("num_attention_heads"), keys.take("hidden_act", str)
    if act not in ACTS:
        raise InputError(f"{keys.where}: hidden_act should be one of {', '.join(ACTS)}, not {act!r}")
    if dim % heads:
        raise InputError(f"{keys.where}: hidden_size {dim} cannot be split over {heads} heads")
    return {"dim": dim, "heads": heads, "act": ACTS[act], "norm": LayerNorm(eps=keys.take("layer_norm_eps", float)),
            "depth": keys.positive("num_hidden_layers"), "hidden": keys.positive("intermediate_size"),
            "dropout": float(keys.take("attention_dropout", (int, float)))}


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: CLIPSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    image, text = spec.image, spec.text
    if not isinstance(image, ViTSpec) or spec.logit_bias is None or image.cls or text.head.proj is None:
        raise InputError("the hf layout of SigLIP holds a ViT without class token, a projected text tower and a bias")
    flex = image.positions == NATIVE
    size = {"num_patches": math.prod(image.patches.grid(*image.image))} if flex else {"image_size": image.image[0]}
    config = {"architectures": ["Siglip2Model" if flex else "SiglipModel"], "model_type": FLEX if flex else FIXED,
              "vision_config": stack_config(image.stack) | size | {
                  "patch_size": image.patches.size[0], "num_channels": image.patches.channels},
              "text_config": stack_config(text.stack) | {
                  "vocab_size": text.vocab, "max_position_embeddings": text.context,
                  "projection_size": text.head.proj.dim}}
    ensure_kept(spec, to_spec(config, CONFIG), "hf")
    return config


def stack_config(stack: Any) -> dict[str, Any]:
    layer = stack.layers[0]
    if layer.mlp is None or layer.mlp.act not in TO_HF or not isinstance(layer.norm, LayerNorm):
        raise InputError("the hf layout of SigLIP holds layers of attention and MLP with LayerNorm")
    return {"hidden_size": stack.dim, "intermediate_size": layer.mlp.hidden, "num_hidden_layers": len(stack.layers),
            "num_attention_heads": layer.mixer.heads, "hidden_act": TO_HF[layer.mlp.act],
            "layer_norm_eps": layer.norm.eps}


# -------------------------------------------------------------------------------------------- weights
def table(spec: CLIPSpec, names: Iterable[str]) -> Table:
    width, patches, v, i = spec.image.stack.dim, spec.image.patches, "vision_model.", "image."
    flat = flattened(patches) if spec.image.positions == NATIVE else None
    rules = [
        rule(v + "embeddings.patch_embedding.weight", i + "patchify.weight", *([flat] if flat else [])),
        rule(v + "embeddings.patch_embedding.bias", i + "patchify.bias"),
        rule(v + "embeddings.position_embedding.weight", i + "positions.weight"),
        rule(v + "post_layernorm.{x}", i + "stack.final_norm.{x}"),
        *block_rules(v + "encoder.", i + "stack.", width), *pool_rules(v + "head.", i + "head.pool.", width),
        rule("text_model.embeddings.token_embedding.weight", "text.tokens"),
        rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        rule("text_model.final_layer_norm.{x}", "text.stack.final_norm.{x}"),
        rule("text_model.head.{x}", "text.head.proj.{x}"),
        *block_rules("text_model.encoder.", "text.stack.", spec.text.stack.dim),
        *(rule(name, name, ONE) for name in ("logit_scale", "logit_bias"))]
    return Table(tuple(rules), {f"{tower}_model.embeddings.position_ids": POSITION_IDS for tower in ("text", "vision")})




def pool_rules(t: str, o: str, width: int) -> list[Rule]:
    q_kv = WeightTransform(lambda xs: list(xs[0].split((width, 2 * width))), lambda xs: [torch.cat(list(xs))])
    return [*(rule(f"{t}attention.in_proj_{x}", (f"{o}attention.q.{x}", f"{o}attention.kv.{x}"), q_kv)
              for x in ("weight", "bias")),
            rule(t + "attention.out_proj.{x}", o + "attention.out.{x}"),
            rule(t + "probe", o + "probe", WeightTransform(lambda xs: [xs[0][0]], lambda xs: [xs[0][None]])),
            rule(t + "layernorm.{x}", o + "norm.{x}"),
            rule(t + "mlp.fc1.{x}", o + "mlp.up.{x}"), rule(t + "mlp.fc2.{x}", o + "mlp.down.{x}")]


def preprocess(folder: Path, spec: CLIPSpec) -> Preprocess | FlexPreprocess:
    if spec.image.positions == NATIVE:
        return FlexPreprocess.from_files(folder, spec.image.patches.size[0])
    if any((folder / name).is_file() for name in HF_NAMES):
        return pictures(folder, spec)
    return Preprocess(size=spec.image.image, resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {"preprocessor_config.json": extras.preprocess.to_hf(), CONFIG: config}


HF_SIGLIP = Family(
    layout="hf", config=CONFIG, weights=FILES, has_text=True,
    model_types=(FIXED, FLEX), to_spec=to_spec, from_spec=from_spec,
    table=table, files=files, preprocess=preprocess)
