"""transformers' SigLIP, and SigLIP 2 at native aspect (NaFlex): model types `siglip` and `siglip2`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Entry, Pieces, Values, always, pair
from mm.checkpoint.files import Folder
from mm.errors import InputError

from ...spec import CLIPSpec, GridTable, Head, Patches, ProbePool, Projection, TextSpec, TokenPool, ViTSpec
from ..flex import HF_NAMES, FlexPreprocess
from ..image import Preprocess
from .common import flattened, pictures, query_and_rest
from .hf_clip import BUFFERS, LAYERS, PICTURE, TEXT, PairKind, tower_weights
from .hf_common import stack_of

SHARED = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
USUAL = {"vision": SHARED | {"num_channels": 3, "patch_size": 16},
         "text": SHARED | {"vocab_size": 32000, "max_position_embeddings": 64}}
NATIVE = GridTable(prefix=False, mode="bilinear", antialias=True)
SQUARE = GridTable(prefix=False, antialias=False)


# ------------------------------------------------------------------------------------- config
def native_size(keys: Keys, v: Values) -> dict[str, Any]:
    """The picture of as many patches as the square table of positions has."""
    count = keys.positive("num_patches", 256)
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(f"{keys.where}: num_patches should be a square number, not {count}")
    return {"vit.image": (side * v["patches.size"][0],) * 2}


def pooled(keys: Keys, v: Values) -> None:
    if not keys.take("vision_use_head", bool, True):
        raise InputError(f"{keys.where}: a tower without its head (vision_use_head false) is not supported")


def projection(keys: Keys, v: Values) -> dict[str, Any]:
    return {"proj.dim": keys.positive("projection_size", v["stack.dim"])}


def siglip(both: Values, vision: Values, text: Values) -> CLIPSpec:
    """The text tower sees both ways, padding included, and is read at its last place: texts must be padded to the
    context."""
    probe = ProbePool(heads=vision["mixer.heads"], mlp=vision.make("mlp"), norm=vision.make("norm"))
    proj = Projection(dim=text["proj.dim"], bias=True)
    return CLIPSpec(
        image=ViTSpec(stack=stack_of(vision), head=Head(pool=probe), cls=0, patches=Patches(**vision.fields("patches")),
                      **vision.fields("vit")),
        text=TextSpec(stack=stack_of(text), head=Head(pool=TokenPool(index=-1), proj=proj), **text.fields("text")),
        logit_scale=math.log(10), logit_bias=-10.0)


class Siglip(PairKind):
    """SiglipModel and Siglip2Model."""

    def pieces(self, spec: CLIPSpec) -> Pieces:
        image = spec.image
        if not isinstance(image, ViTSpec) or spec.logit_bias is None or image.cls or spec.text.head.proj is None:
            raise InputError("the hf layout of SigLIP holds a ViT without class token, a projected text tower and a "
                             "bias")
        return super().pieces(spec)


# ------------------------------------------------------------------------------------- weights
def weights(spec: CLIPSpec) -> dict[str, str]:
    v, t, h, pool = "vision_model.embeddings.", "text_model.embeddings.", "vision_model.head.", "image.head.pool."
    flat = " | flattened" if spec.image.positions == NATIVE else ""
    return {
        v + "patch_embedding.weight": "image.patchify.weight" + flat, v + "patch_embedding.bias": "image.patchify.bias",
        v + "position_embedding.weight": "image.positions.weight",
        **tower_weights("vision", "image"),
        "vision_model.post_layernorm.{x}": "image.stack.final_norm.{x}",
        h + "probe": pool + "probe | batched", h + "layernorm.{x}": pool + "norm.{x}",
        h + "attention.in_proj_weight": pool + "attention.[q kv].weight | q and kv",
        h + "attention.in_proj_bias": pool + "attention.[q kv].bias | q and kv",
        h + "attention.out_proj.{x}": pool + "attention.out.{x}",
        h + "mlp.fc1.{x}": pool + "mlp.up.{x}", h + "mlp.fc2.{x}": pool + "mlp.down.{x}",
        t + "token_embedding.weight": "text.tokens", t + "position_embedding.weight": "text.positions",
        **tower_weights("text", "text"),
        "text_model.final_layer_norm.{x}": "text.stack.final_norm.{x}", "text_model.head.{x}": "text.head.proj.{x}",
        "logit_scale": "logit_scale | one", "logit_bias": "logit_bias | one"}


def preprocess(folder: Folder, spec: CLIPSpec) -> Preprocess | FlexPreprocess:
    if spec.image.positions == NATIVE:
        return FlexPreprocess.from_files(folder, spec.image.patches.size[0])
    if any((folder / name).is_file() for name in HF_NAMES):
        return pictures(folder, spec)
    return Preprocess(size=spec.image.image, resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)


# ------------------------------------------------------------------------------------- kinds
def kind(model_type: str, name: str, size: Entry, usual: Mapping[str, Any], **vit: Any) -> Siglip:
    vision = (*LAYERS, *PICTURE[1:], size, pair("vision_use_head", pooled),
              always(**{f"vit__{key}": value for key, value in vit.items()}))
    return Siglip(
        model_type=model_type, name=name, fields=(), vision=vision, make=siglip, weights=weights, ignored=BUFFERS,
        text=(*TEXT, pair("projection_size", projection, lambda p: {"projection_size": p.text.head.proj.dim})),
        usual={"vision": USUAL["vision"] | usual, "text": USUAL["text"]},
        transforms=lambda spec: {"flattened": flattened(spec.image.patches),
                                 "q and kv": query_and_rest(spec.image.stack.dim)})


FIXED = kind("siglip", "SiglipModel", PICTURE[0], {"image_size": 224}, positions=SQUARE)
FLEX = kind("siglip2", "Siglip2Model", pair(
    "num_patches", native_size, lambda p: {"num_patches": math.prod(p.patches.grid(*p.vit.image))}), {},
    positions=NATIVE, native=True)
HF_SIGLIP = (FIXED.family(preprocess=preprocess), FLEX.family(preprocess=preprocess))


def to_spec(config: Mapping[str, Any], where: str) -> CLIPSpec:
    """The spec of a config of either type. Raises InputError that names keys which are not understood."""
    return (FLEX if config["model_type"] == FLEX.model_type else FIXED).to_spec(config, where)
