"""What the families of encoders share: preprocessing files, plain encoder stacks, and what counts as the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.checkpoint import family
from mm.checkpoint.family import Extras, Keys
from mm.errors import InputError
from mm.spec import EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Stack, Window

from ...spec import ArgmaxPool, CLIPSpec, EosPool, TextSpec, TokenPool, ViTSpec
from ..image import Preprocess

__all__ = ["Extras", "Family", "Keys", "a_vit", "encoder", "ensure_kept", "essence", "pictures"]
TRAINING_ONLY = family.TRAINING_ONLY | {"patch_dropout", "logit_scale", "shift", "stretch", "rescale"}
OTHER_SIZES_ONLY = {"mode", "antialias"}


def pictures(folder: Path, spec: CLIPSpec | ViTSpec) -> Preprocess:
    """The preprocessing of pictures that a directory describes."""
    return Preprocess.from_files(folder, (spec.image if isinstance(spec, ViTSpec) else spec.image.image))


@dataclass(frozen=True, kw_only=True)
class Family(family.Family):
    """A layout of an encoder: pictures are preprocessed as its directory says."""

    preprocess: Callable[[Path, Any], Any] = pictures


def encoder(*, dim: int, depth: int, heads: int, hidden: int, act: str, norm: LayerNorm, window: Window = EVERYWHERE,
            final_norm: bool = True, layer_scale: float | None = None, dropout: float = 0.0) -> Stack:
    """A pre-norm stack of equal layers with biases everywhere."""
    mixer = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, window=window, dropout=dropout)
    layer = Layer(mixer=mixer, mlp=Mlp(hidden=hidden, act=act), norm=norm, layer_scale=layer_scale)
    return Stack(dim=dim, layers=(layer,) * depth, final_norm=norm if final_norm else None)


def a_vit(spec: CLIPSpec, layout: str) -> ViTSpec:
    """The image tower of CLIP's own kind. Raises InputError for another."""
    if not isinstance(spec.image, ViTSpec):
        raise InputError(f"the {layout} layout of CLIP's own ViT cannot hold timm's {spec.image.name}")
    if spec.image.head.proj is None:
        raise InputError(f"the {layout} layout of CLIP's own ViT projects the image features, and this model does not")
    return spec.image


def ensure_kept(settings: Any, read_back: Any, layout: str) -> None:
    """`family.ensure_kept`; how a model trains and how its positions are interpolated are not its identity."""
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
