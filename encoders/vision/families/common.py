"""What the families of vision encoders share: preprocessing files, plain stacks, transforms of weights, and when two
specs count as the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mm.checkpoint import family
from mm.checkpoint.files import Folder
from mm.checkpoint.tables import GATE_UP, SCALAR, WeightTransform
from mm.errors import InputError
from mm.spec import EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Stack, Window

from ...spec import ArgmaxPool, CLIPSpec, EosPool, Patches, PrefixPool, TextSpec, TokenPool, ViTSpec
from ..image import Preprocess

TRAINING_ONLY = family.TRAINING_ONLY | {"patch_dropout", "logit_scale", "shift", "stretch", "rescale"}
OTHER_SIZES_ONLY = {"mode", "antialias"}
PRETRAINING_ONLY = "of masked pretraining only"

# ------------------------------------------------------------------------------------- weights
BATCHED = WeightTransform(lambda xs: [xs[0][0]], lambda xs: [xs[0][None]])
ONE = WeightTransform(SCALAR.load, lambda xs: [xs[0].reshape(1)], loose=True)
PER_LAYER = WeightTransform(lambda xs: list(xs[0].unbind(1)), lambda xs: [torch.stack(list(xs), 1)])
# A class token and a distillation token, each with a classifier; the model's answer is the mean of both.
TWO_HEADS = PrefixPool(tokens=2, join="concat")
TWO_TOKENS = WeightTransform(lambda xs: [torch.cat([x[0] for x in xs])], lambda xs: [row[None, None] for row in xs[0]])
HALF_EACH = WeightTransform(lambda xs: [torch.cat(list(xs), 1) / 2],
                            lambda xs: [2 * half for half in xs[0].chunk(2, 1)])
MEAN_OF_BOTH = WeightTransform(lambda xs: [(xs[0] + xs[1]) / 2], lambda xs: [xs[0], xs[0].clone()])
TRANSFORMS = {"batched": BATCHED, "one": ONE, "halves": GATE_UP, "per layer": PER_LAYER, "two tokens": TWO_TOKENS,
              "half each": HALF_EACH, "mean of both": MEAN_OF_BOTH}  # by the names that rows of tables give them


def flattened(patches: Patches) -> WeightTransform:
    """Patch weights over values in the order row, column, channel, where ours are channel, row, column."""
    (height, width), channels = patches.size, patches.channels
    return WeightTransform(lambda xs: [xs[0].unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)],
                           lambda xs: [xs[0].permute(0, 2, 3, 1).flatten(1)])


def query_and_rest(dim: int) -> WeightTransform:
    """One projection of attention by learned queries, whose first `dim` rows are the query's, from one to two."""
    return WeightTransform(lambda xs: [xs[0][:dim], xs[0][dim:]], lambda xs: [torch.cat(list(xs))])


# ------------------------------------------------------------------------------------- families and specs
def pictures(folder: Folder, spec: CLIPSpec | ViTSpec) -> Preprocess:
    """The preprocessing of pictures that a directory describes."""
    return Preprocess.from_files(folder, (spec.image if isinstance(spec, ViTSpec) else spec.image.image))


@dataclass(frozen=True, kw_only=True)
class Family(family.Family):
    """A layout of an encoder: pictures are preprocessed as its directory says."""

    preprocess: Callable[[Folder, Any], Any] = pictures


def encoder(*, dim: int, depth: int, heads: int, hidden: int, act: str, norm: LayerNorm, window: Window = EVERYWHERE,
            final_norm: bool = True, layer_scale: float | None = None) -> Stack:
    """A pre-norm stack of `depth` equal layers with biases everywhere."""
    mixer = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, window=window)
    layer = Layer(mixer=mixer, mlp=Mlp(hidden=hidden, act=act), norm=norm, layer_scale=layer_scale)
    return Stack(dim=dim, layers=(layer,) * depth, final_norm=norm if final_norm else None)


def projected_vit(spec: CLIPSpec, layout: str) -> ViTSpec:
    """The image tower where it is a ViT with a projection. Raises InputError for another."""
    if not isinstance(spec.image, ViTSpec):
        raise InputError(f"the {layout} layout of CLIP's own ViT cannot hold timm's {spec.image.name}")
    if spec.image.head.proj is None:
        raise InputError(f"the {layout} layout of CLIP's own ViT projects the image features, and this model does not")
    return spec.image


def last_norm(tower: ViTSpec | TextSpec, name: str) -> str:
    """Where the norm before the projection of a tower stands in our names."""
    return f"{name}.{'head.norm' if tower.head.norm else 'stack.final_norm'}"


def ensure_kept(settings: Any, read_back: Any, layout: str) -> None:
    """Raises InputError that names the first thing a layout would lose. How a model trains and how its positions are
    interpolated are not its identity."""
    family.ensure_kept(settings, read_back, layout, essence)


def essence(value: Any) -> Any:
    """A spec as plain data without what `ensure_kept` overlooks; a final norm before a pool of one token counts as
    after it."""
    data = family.plain(value, essence, TRAINING_ONLY | OTHER_SIZES_ONLY)
    if isinstance(value, ViTSpec) and value.positions and not value.cls + value.registers:
        data["positions"].pop("prefix")  # there is none to have a position
    if isinstance(value, ViTSpec | TextSpec) and isinstance(value.head.pool, TokenPool | ArgmaxPool | EosPool):
        data["head"]["norm"] = data["head"]["norm"] or data["stack"].pop("final_norm")
    return data


def ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio that int(dim * ratio) turns into `hidden`."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
