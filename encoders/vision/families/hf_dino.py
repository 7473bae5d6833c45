"""transformers' DINOv2, DINOv2 with registers and DINOv3."""

from __future__ import annotations

import math
from typing import Any

import torch

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Pieces, Values, always, extend, field, pair
from mm.checkpoint.tables import WeightTransform, fused
from mm.errors import InputError
from mm.spec import Axial, Rope

from ...spec import CentredGrid, GridTable, Head, TokenMeanPool, TokenPool, ViTSpec
from .hf_common import DROPOUT, PICTURE, QKV_BIAS, HeadKind, VisionKind, classifier, square, tower

FIRST_TOKEN = HeadKind(lambda dim, classes, norm: Head(pool=TokenPool()), {})
HEADS = {"num_attention_heads": 12}
DINO = (*PICTURE, field("layerscale_value", "layer.layer_scale", kind=float, default=1.0),
        field("drop_path_rate", "layer.drop_path", kind=float, default=0.0))


# ------------------------------------------------------------------------------------- DINOv2
def mlp(keys: Keys, v: Values) -> dict[str, Any]:
    """SwiGLU is narrower by a third, in multiples of 8, and always has SiLU."""
    gated, ratio = keys.take("use_swiglu_ffn", bool, False), keys.take("mlp_ratio", (int, float), 4)
    width = int(v["stack.dim"] * ratio)
    return {"mlp.hidden": hidden_of(width, gated), "mlp.gated": gated} | ({"mlp.act": "silu"} if gated else {})


def mlp_keys(p: Pieces) -> dict[str, Any]:
    ratio = next((r for r in range(1, 33) if hidden_of(p.stack.dim * r, p.mlp.gated) == p.mlp.hidden), None)
    if ratio is None:
        raise InputError(f"the hf layout of DINOv2 holds whole mlp ratios, which do not give {p.mlp.hidden}")
    return {"mlp_ratio": ratio, "use_swiglu_ffn": p.mlp.gated} | ({"hidden_act": "gelu"} if p.mlp.gated else {})


def hidden_of(width: int, gated: bool) -> int:
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


V2 = (*tower(1e-6, hidden_size=768, num_hidden_layers=12, hidden_act="gelu"), *DINO, QKV_BIAS, DROPOUT,
      pair("mlp_ratio", mlp, mlp_keys), square("patch_size", "patches.size", 14),
      always(vit__positions=GridTable(prefix=True, antialias=False)))
REGISTERS = extend(V2, square("patch_size", "patches.size", 16),
                   field("num_register_tokens", "vit.registers", kind=(int,), default=4),
                   always(vit__positions=GridTable(prefix=False, antialias=True)))
BLOCK = {
    "norm1.{x}": "mixer_norm.{x}", "norm2.{x}": "mlp_norm.{x}",
    "layer_scale1.lambda1": "mixer_scale", "layer_scale2.lambda1": "mlp_scale"}
V2_BLOCK = BLOCK | {
    "attention.attention.[query key value].{x}": "mixer.qkv.{x} | qkv", "attention.output.dense.{x}": "mixer.out.{x}",
    "mlp.fc1.{x}": "mlp.up.{x}", "mlp.fc2.{x}": "mlp.down.{x}",
    "mlp.weights_in.{x}": "mlp.[gate up].{x} | halves", "mlp.weights_out.{x}": "mlp.down.{x}"}
# The position of the class token is part of it where registers stand between it and the patches.
FOLDED = WeightTransform(lambda xs: [xs[0][0] + xs[1][0, :1], xs[1][0, 1:]],
                         lambda xs: [xs[0][None], torch.cat([torch.zeros_like(xs[1][:1]), xs[1]])[None]])


def v2_weights(spec: ViTSpec) -> dict[str, str]:
    other = "mlp.fc" if spec.stack.layers[0].mlp.gated else "mlp.weights"
    block = {theirs: ours for theirs, ours in V2_BLOCK.items() if not theirs.startswith(other)}
    first = {"embeddings.[cls_token position_embeddings]": "[cls positions.weight] | folded"} if spec.registers else {
        "embeddings.cls_token": "cls | batched", "embeddings.position_embeddings": "positions.weight | batched"}
    return first | {
        "embeddings.register_tokens": "registers | batched",
        "embeddings.patch_embeddings.projection.{x}": "patchify.{x}",
        **{f"encoder.layer.{{n}}.{theirs}": f"stack.blocks.{{n}}.{ours}" for theirs, ours in block.items()},
        "layernorm.{x}": "stack.final_norm.{x}"}


# ------------------------------------------------------------------------------------- DINOv3
def moves(keys: Keys, v: Values) -> dict[str, Any]:
    """How rotary coordinates move while training."""
    shift, stretch, rescale = (float(keys.take(f"pos_embed_{name}", (int, float), default)) for name, default in (
        ("shift", 0.0), ("jitter", 1.0), ("rescale", 1.0)))
    return {"vit.coords": CentredGrid(shift=shift, stretch=stretch, rescale=rescale)}


def moves_keys(p: Pieces) -> dict[str, Any]:
    grid = p.vit.coords
    if not isinstance(grid, CentredGrid):
        raise InputError(f"the hf layout of DINOv3 has centred coordinates, not {grid}")
    return {"pos_embed_shift": grid.shift or None, "pos_embed_jitter": None if grid.stretch == 1 else grid.stretch,
            "pos_embed_rescale": None if grid.rescale == 1 else grid.rescale}


def rope(keys: Keys, v: Values) -> dict[str, Any]:
    theta = float(keys.take("rope_theta", (int, float), 100.0))
    return {"mixer.rope": Rope(theta=theta, frequency=2 * math.pi, axes=Axial())}


V3 = (*tower(1e-5, "attention_dropout", hidden_size=384, num_hidden_layers=12, hidden_act="gelu"), *DINO,
      field("intermediate_size", "mlp.hidden", default=1536), square("patch_size", "patches.size", 16),
      field("mlp_bias", "mlp.up_bias", "mlp.down_bias", kind=bool, default=True),
      field("use_gated_mlp", "mlp.gated", kind=bool, default=False),
      *(field(f"{theirs}_bias", f"mixer.{ours}_bias", kind=bool, default=theirs != "key")
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("proj", "out"))),
      pair("rope_theta", rope, lambda p: {"rope_theta": p.mixer.rope.theta}),
      field("num_register_tokens", "vit.registers", kind=(int,), default=0), pair("pos_embed_shift", moves, moves_keys),
      always(vit__positions=None))
V3_BLOCK = BLOCK | {
    "attention.[q k v]_proj.weight": "mixer.qkv.weight | qkv", "attention.o_proj.{x}": "mixer.out.{x}",
    "mlp.gate_proj.{x}": "mlp.gate.{x}", "mlp.up_proj.{x}": "mlp.up.{x}", "mlp.down_proj.{x}": "mlp.down.{x}"}


def biased(spec: ViTSpec) -> list[str]:
    return [part for part in "qkv" if getattr(spec.stack.layers[0].mixer, f"{part}_bias")]


def v3_weights(spec: ViTSpec) -> dict[str, str]:
    parts = " ".join(biased(spec))
    block = V3_BLOCK | ({f"attention.[{parts}]_proj.bias": "mixer.qkv.bias | biases"} if parts else {})
    return {"embeddings.cls_token": "cls | batched", "embeddings.register_tokens": "registers | batched",
            "embeddings.patch_embeddings.{x}": "patchify.{x}",
            **{f"layer.{{n}}.{theirs}": f"stack.blocks.{{n}}.{ours}" for theirs, ours in block.items()},
            "norm.{x}": "stack.final_norm.{x}"}


# ------------------------------------------------------------------------------------- kinds
def v2_kind(model_type: str, title: str, fields: tuple) -> VisionKind:
    return VisionKind(
        model_type=model_type, fields=fields, weights=v2_weights, under=model_type + ".", defaults=HEADS,
        transforms=lambda spec: {"folded": FOLDED},
        heads={title + "Model": FIRST_TOKEN, title + "ForImageClassification": classifier(TokenMeanPool())})


HF_DINO = (
    v2_kind("dinov2", "Dinov2", V2).family(),
    v2_kind("dinov2_with_registers", "Dinov2WithRegisters", REGISTERS).family(),
    VisionKind(model_type="dinov3_vit", fields=V3, weights=v3_weights, under="", defaults=HEADS,
               transforms=lambda spec: {"biases": fused(*[spec.stack.dim] * len(biased(spec)))},
               heads={"DINOv3ViTModel": FIRST_TOKEN}).family())
