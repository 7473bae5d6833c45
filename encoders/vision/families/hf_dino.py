"""transformers' DINOv2, DINOv2 with registers and DINOv3."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mm.checkpoint.tables import Rule, Table, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import Axial, Layer, Mlp, Rope, Stack

from ...spec import CentredGrid, GridTable, Head, Patches, Projection, TokenMeanPool, TokenPool, ViTSpec
from .common import Extras, Family, Keys, ensure_kept
from .hf_common import (
    CONFIG,
    FILES,
    HARMLESS,
    PRETRAINING_ONLY,
    act_of,
    attention,
    classes,
    label_config,
    labels,
    layers_of,
    legacy_rules,
    norm_of,
    one_size,
    start,
)
from .hf_vit import files
from .transforms import BATCHED, HALVES

V2, REGISTERS, V3 = "dinov2", "dinov2_with_registers", "dinov3_vit"
TITLES = {V2: "Dinov2", REGISTERS: "Dinov2WithRegisters"}
MODEL, CLASSIFIER = "model", "classifier"
# The position of the class token is part of it where registers stand between it and the patches.
FOLDED = WeightTransform(lambda xs: [xs[0][0] + xs[1][0, :1], xs[1][0, 1:]],
             lambda xs: [xs[0][None], torch.cat([torch.zeros_like(xs[1][:1]), xs[1]])[None]])


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> ViTSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    kind = config["model_type"]
    known = {"DINOv3ViTModel": MODEL} if kind == V3 else {
        f"{TITLES[kind]}Model": MODEL, f"{TITLES[kind]}ForImageClassification": CLASSIFIER}
    keys, head = start(config, where, known)
    dim, norm = keys.positive("hidden_size", 384 if kind == V3 else 768), norm_of(keys, 1e-5 if kind == V3 else 1e-6)
    layer = Layer(**(layer_v3 if kind == V3 else layer_v2)(keys, dim), norm=norm,
                  layer_scale=float(keys.take("layerscale_value", (int, float), 1.0)),
                  drop_path=float(keys.take("drop_path_rate", (int, float), 0.0)))
    classifier = Projection(dim=classes(config), bias=True)
    patches = Patches(size=keys.pair("patch_size", 14 if kind == V2 else 16),
                      channels=keys.positive("num_channels", 3))
    registers = 0 if kind == V2 else keys.take("num_register_tokens", int, 4 if kind == REGISTERS else 0)
    spec = ViTSpec(
        image=keys.pair("image_size", 224), patches=patches, registers=registers, coords=moves(keys, kind),
        positions=None if kind == V3 else GridTable(prefix=kind == V2, antialias=kind == REGISTERS),
        stack=Stack(dim=dim, layers=(layer,) * keys.positive("num_hidden_layers", 12), final_norm=norm),
        head=Head(pool=TokenPool()) if head == MODEL else Head(pool=TokenMeanPool(), proj=classifier))
    keys.done(HARMLESS)
    return spec


def layer_v2(keys: Keys, dim: int) -> dict[str, Any]:
    bias, gated = keys.take("qkv_bias", bool, True), keys.take("use_swiglu_ffn", bool, False)
    hidden = hidden_of(int(dim * keys.take("mlp_ratio", (int, float), 4)), gated)
    act = act_of(keys)
    return {"mixer": attention(keys, dim, q_bias=bias, k_bias=bias, v_bias=bias),
            "mlp": Mlp(hidden=hidden, act="silu" if gated else act, gated=gated),
            "dropout": float(keys.take("hidden_dropout_prob", (int, float), 0.0))}


def hidden_of(width: int, gated: bool) -> int:
    """SwiGLU keeps the number of weights, in multiples of 8."""
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def layer_v3(keys: Keys, dim: int) -> dict[str, Any]:
    biases = {f"{ours}_bias": keys.take(f"{theirs}_bias", bool, theirs != "key")
              for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "proj"))}
    rope = Rope(theta=float(keys.take("rope_theta", (int, float), 100.0)), frequency=2 * math.pi, axes=Axial())
    bias = keys.take("mlp_bias", bool, True)
    mlp = Mlp(hidden=keys.positive("intermediate_size", 1536), act=act_of(keys), up_bias=bias, down_bias=bias,
              gated=keys.take("use_gated_mlp", bool, False))
    return {"mixer": attention(keys, dim, "attention_dropout", rope=rope, **biases), "mlp": mlp}


def moves(keys: Keys, kind: str) -> CentredGrid | None:
    """How rotary coordinates move while training."""
    if kind != V3:
        return None
    shift, stretch, rescale = (keys.take(f"pos_embed_{name}", (int, float), default) for name, default in
                               (("shift", 0.0), ("jitter", 1.0), ("rescale", 1.0)))
    return CentredGrid(shift=float(shift), stretch=float(stretch), rescale=float(rescale))


# ------------------------------------------------------------------------------------- spec to config
def kind_of(spec: ViTSpec) -> tuple[str, str]:
    """(model type, architecture) that may hold a spec."""
    if spec.coords is not None:
        return V3, "DINOv3ViTModel"
    kind = REGISTERS if spec.registers else V2
    return kind, TITLES[kind] + ("ForImageClassification" if spec.head.proj else "Model")


def from_spec(spec: ViTSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    kind, architecture = kind_of(spec)
    layer, (image, patch) = next(iter(spec.stack.layers), None), one_size(spec, "hf")
    config = {"architectures": [architecture], "model_type": kind, **layers_of(spec.stack), "image_size": image,
              "patch_size": patch, "num_channels": spec.patches.channels, "layerscale_value": layer.layer_scale}
    config |= config_v3(spec) if kind == V3 else config_v2(layer, spec.stack.dim)
    if kind != V2:
        config["num_register_tokens"] = spec.registers
    config |= label_config(Extras(), spec.head.proj, spec.head.proj is not None)
    ensure_kept(spec, to_spec(config, CONFIG), "hf")
    return config


def config_v2(layer: Layer, dim: int) -> dict[str, Any]:
    ratio = next((r for r in range(1, 33) if hidden_of(dim * r, layer.mlp.gated) == layer.mlp.hidden), None)
    if ratio is None:
        raise InputError(f"the hf layout of DINOv2 holds whole mlp ratios, which do not give {layer.mlp.hidden}")
    return {"mlp_ratio": ratio, "qkv_bias": layer.mixer.q_bias, "use_swiglu_ffn": layer.mlp.gated,
            **({"hidden_act": "gelu"} if layer.mlp.gated else {})}


def config_v3(spec: ViTSpec) -> dict[str, Any]:
    layer, grid = spec.stack.layers[0], spec.coords
    if not isinstance(grid, CentredGrid):
        raise InputError(f"the hf layout of DINOv3 has centred coordinates, not {grid}")
    mixer, mlp = layer.mixer, layer.mlp
    return {"intermediate_size": mlp.hidden, "use_gated_mlp": mlp.gated, "mlp_bias": mlp.up_bias,
            "query_bias": mixer.q_bias, "key_bias": mixer.k_bias, "value_bias": mixer.v_bias,
            "proj_bias": mixer.out_bias, "rope_theta": mixer.rope.theta,
            "pos_embed_shift": grid.shift or None, "pos_embed_jitter": None if grid.stretch == 1 else grid.stretch,
            "pos_embed_rescale": None if grid.rescale == 1 else grid.rescale}


# -------------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    kind, architecture = kind_of(spec)
    below = "" if architecture.endswith("Model") else kind + "."
    rules = rules_v3(spec) if kind == V3 else rules_v2(spec, kind, below)
    return Table((*rules, rule("classifier.{x}", "head.proj.{x}")),
                 {below + "embeddings.mask_token": PRETRAINING_ONLY})


def rules_v2(spec: ViTSpec, kind: str, below: str) -> list[Rule]:
    e, t, o = below + "embeddings.", below + "encoder.layer.{n}.", "stack.blocks.{n}."
    layer = spec.stack.layers[0]
    cls, positions = e + "cls_token", e + "position_embeddings"
    first = [rule((cls, positions), ("cls", "positions.weight"), FOLDED)] if kind == REGISTERS else [
        rule(cls, "cls", BATCHED), rule(positions, "positions.weight", BATCHED)]
    mlp = [rule(t + "mlp.weights_in.{x}", (o + "mlp.gate.{x}", o + "mlp.up.{x}"), HALVES),
           rule(t + "mlp.weights_out.{x}", o + "mlp.down.{x}")] if layer.mlp.gated else [
        rule(t + "mlp.fc1.{x}", o + "mlp.up.{x}"), rule(t + "mlp.fc2.{x}", o + "mlp.down.{x}")]
    return [*first, rule(e + "register_tokens", "registers", BATCHED),
            rule(e + "patch_embeddings.projection.{x}", "patchify.{x}"), *shared_rules(t, o), *mlp,
            *legacy_rules(below, spec.stack.dim, layer.mixer.q_bias),
            rule(below + "layernorm.{x}", "stack.final_norm.{x}")]


def rules_v3(spec: ViTSpec) -> list[Rule]:
    t, o, dim, mixer = "layer.{n}.", "stack.blocks.{n}.", spec.stack.dim, spec.stack.layers[0].mixer
    parts = {name: f"{t}attention.{name}_proj." for name in "qkv"}
    held = [name for name in "qkv" if getattr(mixer, f"{name}_bias")]
    biases = [rule(tuple(parts[name] + "bias" for name in held), o + "mixer.qkv.bias", fused(*[dim] * len(held)))]
    return [rule("embeddings.cls_token", "cls", BATCHED), rule("embeddings.register_tokens", "registers", BATCHED),
            rule("embeddings.patch_embeddings.{x}", "patchify.{x}"), *shared_rules(t, o), *(biases if held else []),
            rule(tuple(part + "weight" for part in parts.values()), o + "mixer.qkv.weight", fused(dim, dim, dim)),
            rule(t + "attention.o_proj.{x}", o + "mixer.out.{x}"),
            *(rule(f"{t}mlp.{name}_proj.{{x}}", f"{o}mlp.{name}.{{x}}") for name in ("up", "gate", "down")),
            rule("norm.{x}", "stack.final_norm.{x}")]


def shared_rules(t: str, o: str) -> list[Rule]:
    return [rule(t + "norm1.{x}", o + "mixer_norm.{x}"), rule(t + "norm2.{x}", o + "mlp_norm.{x}"),
            rule(t + "layer_scale1.lambda1", o + "mixer_scale"), rule(t + "layer_scale2.lambda1", o + "mlp_scale")]


HF_DINO = Family(layout="hf", config=CONFIG, weights=FILES,
                 model_types=(*TITLES, V3), to_spec=to_spec,
                 from_spec=from_spec, table=table, files=files, labels=labels)
